"""MultiNLI's files as they come: JSON lines, the tables called .txt, and GLUE's .tsv."""

import json
from pathlib import Path

import pytest

from rankwise.data.examples import Examples, load_examples
from rankwise.errors import UserError

GOLD = ("neutral", "-", "entailment", "contradiction", "-", "neutral")
FIRST, SECOND = ' "Product" and geography', "Cream skimming."  # a leading space, as in the corpus
TREE = "(ROOT (S (NP (JJ Conceptually) (NN cream))))"
TEXT = (
    *("gold_label", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse"),
    *("sentence2_parse", "sentence1", "sentence2", "promptID", "pairID", "genre"),
    *("label1", "label2", "label3", "label4", "label5"),
)
GLUE = (
    *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
    *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"),
)


def row(i: int, gold: str) -> dict[str, str]:
    return {
        "index": str(i),
        "gold_label": gold,
        "sentence1": f"{FIRST} {i}",
        "sentence2": f"{SECOND} {i}",
        **{f"sentence{n}_parse": TREE for n in (1, 2)},
        **{f"sentence{n}_binary_parse": "( ( a b ) c )" for n in (1, 2)},
        "promptID": str(31193 + i),
        "pairID": f"{31193 + i}n",
        "genre": ("government", "fiction")[i % 2],
        "label1": "neutral",
        **{f"label{n}": "entailment" if n % 2 else "neutral" for n in (2, 3, 4, 5)},
    }


def table(names: tuple[str, ...], annotators: int = 5) -> str:
    """A table; the row ends after so many annotators' labels, where they are the last columns."""
    lines = ["\t".join(names)]
    for i, gold in enumerate(GOLD):
        fields = [row(i, gold)[name] for name in names]
        lines.append("\t".join(fields[: len(fields) - 5 + annotators]))
    return "\n".join(lines) + "\n"


def json_lines() -> str:
    made: list[str] = []
    for i, gold in enumerate(GOLD):
        kept = {k: v for k, v in row(i, gold).items() if not k.startswith(("label", "index"))}
        made.append(json.dumps({"annotator_labels": ["neutral"] * 5, **kept}) + "\n")
    return "".join(made)


FILES = {
    "multinli_1.0_train.jsonl": json_lines(),
    "multinli_1.0_dev_matched.jsonl": json_lines(),
    "multinli_1.0_train.txt": table(TEXT, annotators=1),
    "multinli_1.0_dev_mismatched.txt": table(TEXT),
    "train.tsv": table(GLUE),
    "dev_matched.tsv": table((*GLUE[:-1], "label2", "label3", "label4", "label5", GLUE[-1])),
}


def check(found: Examples) -> None:
    kept = [i for i, gold in enumerate(GOLD) if gold != "-"]
    assert (found.task, found.form) == ("classification", "pair")
    assert found.columns == ("sentence1", "sentence2", "gold_label")
    assert found.label_names == ("contradiction", "entailment", "neutral")
    assert found.texts == [f"{FIRST} {i}" for i in kept]
    assert found.pairs == [f"{SECOND} {i}" for i in kept]
    assert [found.label_names[int(i)] for i in found.labels or ()] == [GOLD[i] for i in kept]


@pytest.mark.parametrize("name", FILES)
def test_rows_with_an_agreed_label_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    found = load_examples(tmp_path / name)
    check(found)
    assert any(
        "is '-' (no agreed label) in 2 of 6 rows, which are left out" in n for n in found.notes
    )


@pytest.mark.parametrize("name", [name for name in FILES if "dev" in name])
def test_an_evaluation_file_has_the_classes_of_the_training_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    known = ("contradiction", "entailment", "neutral")
    check(load_examples(tmp_path / name, "classification", label_names=known, fallback=True))


def test_a_test_file_without_labels_can_be_predicted(tmp_path: Path) -> None:
    file = tmp_path / "test_matched.tsv"
    file.write_text(table(GLUE[:-2]), encoding="utf-8")
    found = load_examples(file, "classification", require_labels=False)
    assert (found.form, found.labels, len(found)) == ("pair", None, 6)


def test_other_short_rows_are_still_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.tsv"
    file.write_text("sentence1\tsentence2\tgold_label\tlabel1\na\tb\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.tsv:2: 2 fields"):
        load_examples(file)


def test_other_text_files_stay_text(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("label\tsentence\n1\ta fine film\n", encoding="utf-8")
    assert load_examples(file).task == "causal-lm"
