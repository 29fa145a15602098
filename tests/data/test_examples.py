"""From a file to examples: tasks, labels, faults with file and line, fingerprints."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.columns import ColumnNames
from rankwise.data.examples import Examples, load_examples
from rankwise.errors import UserError


def tsv(folder: Path, *rows: str, name: str = "train.tsv", header: str = "text\tlabel") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n", "utf-8")
    return path


def jsonl(folder: Path, *rows: object, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def refused(path: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_examples(path, **options)
    return str(caught.value)


# --- tasks and forms -----------------------------------------------------------------------------


def test_classification(tmp_path):
    path = tsv(tmp_path, "good film\tpos", "bad film\tneg", "", "fine film\tpos")
    found = load_examples(path)
    assert found == Examples(
        task="classification",
        source=str(path),
        lines=[2, 3, 5],
        texts=["good film", "bad film", "fine film"],
        labels=[1, 0, 1],
        label_names=("neg", "pos"),
        columns=("text", "label"),
    )
    assert (found.form, found.notes, len(found)) == ("text", (), 3)
    assert found.name(2) == f"{path}:5"


def test_regression_of_a_pair(tmp_path):
    path = tsv(tmp_path, "a b\tc d\t3.8", "e\tf\t5", header="sentence1\tsentence2\tscore")
    found = load_examples(path)
    assert (found.task, found.form) == ("regression", "pair")
    assert (found.texts, found.pairs) == (["a b", "e"], ["c d", "f"])
    assert found.labels == [3.8, 5.0]
    assert found.label_names == ()


def test_whole_numbers_are_quantities_when_asked(tmp_path):
    found = load_examples(tsv(tmp_path, "a\t1", "b\t5"), task="regression")
    assert found.labels == [1.0, 5.0]
    assert all(isinstance(v, float) for v in found.labels)


def test_prompts_are_verbatim(tmp_path):
    path = jsonl(tmp_path, {"prompt": "Q: ", "completion": "A"})
    found = load_examples(path)
    assert (found.task, found.form, found.prompts) == ("causal-lm", "prompt", [("Q: ", "A")])
    assert found.labels is None


def test_questions_and_answers_are_conversations(tmp_path):
    path = jsonl(
        tmp_path,
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
    )
    found = load_examples(path)
    assert (found.task, found.form) == ("causal-lm", "messages")
    assert [m["content"] for row in found.messages for m in row] == [
        *("Add.\n\n1 2", "3"),
        *("Greet.", "Hello"),
    ]


def test_messages(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    found = load_examples(jsonl(tmp_path, {"messages": chat}))
    assert (found.task, found.messages) == ("causal-lm", [chat])


def test_plain_text_is_for_a_language_model_and_says_how_it_is_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one line\n\nanother\n")
    found = load_examples(path)
    assert (found.task, found.texts, found.lines) == ("causal-lm", ["one line", "another"], [1, 3])
    assert "each line is one example" in found.notes[0]


def test_a_lone_text_column_is_for_a_language_model(tmp_path):
    found = load_examples(jsonl(tmp_path, {"text": "some words"}))
    assert (found.task, found.labels) == ("causal-lm", None)


def test_labels_are_not_read_for_a_language_model(tmp_path):
    found = load_examples(tsv(tmp_path, "a b\t1", "c\t"), task="causal-lm")
    assert (found.labels, found.label_names, found.columns) == (None, (), ("text",))


def test_an_unknown_task_and_a_limit_of_nothing(tmp_path):
    assert "Unknown task 'lm'" in refused(tsv(tmp_path, "a\t1"), task="lm")
    assert "limit must be 1 or more" in refused(tsv(tmp_path, "a\t1"), limit=0)


# --- evaluation and prediction -------------------------------------------------------------------


def test_an_evaluation_file_takes_the_labels_of_the_train_file(tmp_path):
    found = load_examples(tsv(tmp_path, "a\tpos", "b\tpos"), label_names=("neg", "pos", "odd"))
    assert found.labels == [1, 1]
    assert found.label_names == ("neg", "pos", "odd")


def test_a_label_unknown_to_the_train_file(tmp_path):
    path = tsv(tmp_path, "a\tpos", "b\tneutral")
    message = refused(path, label_names=("neg", "pos"))
    assert (
        f"{path}:3: label 'label' 'neutral' is not one of the known labels 'neg', 'pos'" in message
    )


def test_prediction_needs_no_labels(tmp_path):
    path = tsv(tmp_path, "7\ta b", "8\tc", header="id\tsentence")
    found = load_examples(path, task="classification", label_names=("0", "1"), require_labels=False)
    assert (found.texts, found.labels, found.label_names) == (["a b", "c"], None, ("0", "1"))


def test_prediction_leaves_out_labels_that_it_cannot_read(tmp_path):
    path = tsv(tmp_path, "a\t-1", "b\t-1")
    options = {"task": "classification", "label_names": ("0", "1"), "require_labels": False}
    found = load_examples(path, **options)
    assert (found.labels, found.label_names) == (None, ("0", "1"))
    assert "are left out" in found.notes[0]
    assert load_examples(tsv(tmp_path, "a\t1"), **options).labels == [1]


def test_prediction_needs_no_completions(tmp_path):
    path = jsonl(tmp_path, {"prompt": "Q1"}, {"prompt": "Q2", "completion": ""})
    found = load_examples(path, require_labels=False)
    assert found.prompts == [("Q1", ""), ("Q2", "")]
    path = jsonl(tmp_path, {"instruction": "Go."})
    found = load_examples(path, require_labels=False)
    assert found.messages == [[{"role": "user", "content": "Go."}]]


def test_the_limit_is_a_fixed_sample_in_the_order_of_the_file(tmp_path):
    path = tsv(tmp_path, *(f"text {i}\t{i // 50}" for i in range(100)))
    found = load_examples(path, limit=20)
    assert len(found) == 20
    assert found.lines == sorted(found.lines)
    assert set(found.labels) == {0, 1}  # a sorted file still gives both classes
    assert "20 of 100 rows are used" in found.notes[0]
    assert load_examples(path, limit=20) == found
    assert load_examples(path, limit=100).notes == ()


# --- faults --------------------------------------------------------------------------------------


def test_all_bad_rows_are_listed_at_once(tmp_path):
    path = jsonl(
        tmp_path,
        {"text": "fine", "label": "a"},
        {"text": "", "label": "b"},
        {"label": "b"},
        {"text": 7, "label": "a"},
        {"text": "no label"},
        {"text": "bad label", "label": ["a"]},
        {"text": "nul \0", "label": "a"},
        {"text": "half \ud800", "label": "a"},
        {"text": "  ", "label": None},
    )
    message = refused(path)
    for line, words in (
        (2, "'text' is empty"),
        (3, "'text' is missing"),
        (4, "'text' is a int, not text"),
        (5, "label 'label' is missing"),
        (6, "label 'label' is a list"),
        (7, "'text' holds a NUL character"),
        (8, "'text' holds half of a surrogate pair"),
        (9, "'text' is empty"),
        (9, "label 'label' is missing"),
    ):
        assert f"{path}:{line}: {words}" in message
    assert ":1:" not in message


def test_an_empty_second_text_of_a_pair(tmp_path):
    path = tsv(tmp_path, "a\tb\t1", "a\t\t0", header="sentence1\tsentence2\tlabel")
    assert f"{path}:3: 'sentence2' is empty" in refused(path)


def test_one_class_only(tmp_path):
    message = refused(tsv(tmp_path, "a\t1", "b\t1"))
    assert "holds the one label '1' in every row" in message
    assert "--label-column" in message


def test_quantities_that_are_not_finite(tmp_path):
    path = jsonl(tmp_path, *({"text": "a", "score": s} for s in (0.5, float("nan"), "x", 1e999)))
    message = refused(path)
    assert f"{path}:2: label 'score' is missing" in message
    assert f"{path}:3: label 'score' 'x' is not a finite number" in message
    assert f"{path}:4: label 'score' inf is not a finite number" in message


def test_bad_conversations_and_completions(tmp_path):
    path = jsonl(tmp_path, {"messages": [{"role": "user", "content": "x"}]}, {"messages": []})
    message = refused(path)
    assert f"{path}:1: 'messages' has no assistant message" in message
    assert f"{path}:2: 'messages' has no messages" in message
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "", "completion": None})
    message = refused(path)
    assert f"{path}:2: 'prompt' is empty" in message
    assert f"{path}:2: 'completion' is missing" in message


def test_rows_without_an_agreed_label_are_left_out_with_a_note(tmp_path):
    path = tsv(
        tmp_path,
        *("a\tb\tneutral", "c\td\t-", "e\tf\tentailment"),
        header="sentence1\tsentence2\tgold_label",
    )
    found = load_examples(path)
    assert (found.texts, found.pairs, found.labels) == (["a", "e"], ["b", "f"], [1, 0])
    assert found.lines == [2, 4]
    assert "1 of 3 rows" in found.notes[0]


def test_a_file_in_which_no_row_has_an_agreed_label(tmp_path):
    message = refused(tsv(tmp_path, "a\t-", "b\t-"), label_names=("no", "yes"))
    assert "no row has an agreed label" in message


def test_a_label_column_that_looks_like_quantities_is_pointed_out(tmp_path):
    found = load_examples(tsv(tmp_path, *(f"text\t{i}" for i in range(30))))
    assert "30 different labels in 30 rows" in found.notes[0]
    assert "--task regression" in found.notes[0]


def test_named_columns_and_their_fallback(tmp_path):
    path = tsv(tmp_path, "a\t1", "b\t0", header="content\tlabel")
    wanted = ColumnNames(text="sentence")
    assert "Did you mean" in refused(path, columns=ColumnNames(text="contents"))
    assert "--text-column sentence" in refused(path, columns=wanted)
    found = load_examples(path, columns=wanted, fallback=True)
    assert found.texts == ["a", "b"]
    assert "no column 'sentence'" in found.notes[0]


# --- the value -----------------------------------------------------------------------------------


def test_lists_of_different_lengths_and_forms_are_refused():
    with pytest.raises(UserError, match="lists of 2 rows"):
        Examples("classification", "x", [1, 2], texts=["a", "b"], labels=[0])
    with pytest.raises(UserError, match="one of texts, prompts and messages"):
        Examples("causal-lm", "x", [1], texts=["a"], prompts=[("a", "b")])
    with pytest.raises(UserError, match="one of texts, prompts and messages"):
        Examples("causal-lm", "x", [])


@given(st.data())
def test_a_subset_keeps_rows_whole(data):
    n = data.draw(st.integers(1, 10))
    whole = Examples(
        "classification",
        "x",
        list(range(n)),
        texts=[f"t{i}" for i in range(n)],
        pairs=[f"p{i}" for i in range(n)],
        labels=list(range(n)),
        label_names=tuple("abcdefghij"),
    )
    rows = data.draw(st.lists(st.integers(0, n - 1)))
    part = whole.subset(rows)
    assert part.lines == part.labels == rows
    assert part.texts == [f"t{i}" for i in rows]
    assert part.pairs == [f"p{i}" for i in rows]
    assert part.label_names == whole.label_names
    assert whole.subset(range(n)) == whole


def test_the_fingerprint_is_of_the_content_alone(tmp_path):
    one = load_examples(tsv(tmp_path, "good, film\t1", "bad\t0"))
    csv = tmp_path / "other.csv"
    csv.write_bytes(b'\xef\xbb\xbflabel,sentence\r\n1,"good, film"\r\n\r\n0,bad\r\n')
    assert load_examples(csv).fingerprint == one.fingerprint
    # Written out: a change here makes every recorded run look as if its data had changed.
    spelled = '["classification", "text", ["0", "1"]]\n[["good, film"], 1]\n[["bad"], 0]'
    assert one.fingerprint == hashlib.sha256(spelled.encode()).hexdigest()


def test_the_fingerprint_sees_every_change(tmp_path):
    rows = [
        ("good\t1", "bad\t0"),
        ("bad\t0", "good\t1"),
        ("good\t0", "bad\t1"),
        ("good\t1", "x\t0"),
    ]
    prints = [load_examples(tsv(tmp_path, *row)).fingerprint for row in rows]
    base = load_examples(tsv(tmp_path, *rows[0]))
    prints += [
        load_examples(tsv(tmp_path, *rows[0]), task="regression").fingerprint,
        load_examples(tsv(tmp_path, *rows[0]), label_names=("0", "1", "2")).fingerprint,
        base.subset([0]).fingerprint,
        base.subset([]).fingerprint,
    ]
    assert len({base.fingerprint, *prints}) == len(prints)


def test_reading_data_loads_neither_torch_nor_transformers(repository):
    # A stand-in for the package keeps rankwise/__init__.py, which needs torch, out of the way.
    code = (
        "import sys, types\n"
        "package = types.ModuleType('rankwise')\n"
        "package.__path__ = [sys.argv[1]]\n"
        "sys.modules['rankwise'] = package\n"
        "import rankwise.data.examples, rankwise.data.splits, rankwise.data.pydocs\n"
        "import rankwise.data.encode\n"
        "print({'torch', 'numpy', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    source = str(repository / "src" / "rankwise")
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_sst2_without_flags_and_with(shared):
    train = load_examples(shared / "data/sst2/train.tsv")
    assert (train.task, train.form, train.label_names) == ("classification", "text", ("0", "1"))
    assert (len(train), train.columns, train.notes) == (67_349, ("sentence", "label"), ())
    assert train.texts[0] == "hide new secretions from the parental units"
    dev_path = shared / "data/sst2/dev.tsv"
    dev = load_examples(dev_path, label_names=train.label_names)
    assert (len(dev), dev.columns) == (872, ("content", "label"))
    wanted = ColumnNames(text="sentence", label="label")
    noted = load_examples(dev_path, columns=wanted, label_names=("0", "1"), fallback=True)
    assert noted == dev
    assert noted.fingerprint == dev.fingerprint
    assert "'sentence'" in noted.notes[0]


def test_prediction_keeps_rows_whose_label_is_not_known(tmp_path):
    path = tsv(tmp_path, "a\t1", "b\t-", "c\tother", "d\t0")
    options = {"task": "classification", "label_names": ("0", "1"), "require_labels": False}
    found = load_examples(path, **options)
    assert (found.texts, found.lines) == (["a", "b", "c", "d"], [2, 3, 4, 5])
    assert (found.labels, found.unlabelled) == ([1, 0, 0, 0], {1, 2})
    assert "2 of 4 rows have no known label" in found.notes[0]
    assert "'other'" in found.notes[0]
    part = found.subset([3, 2, 0])
    assert (part.labels, part.unlabelled) == ([0, 0, 1], {1})
    assert (
        part.fingerprint
        != load_examples(tsv(tmp_path, "d\t0", "c\t0", "a\t1"), **options).fingerprint
    )


def test_prediction_keeps_rows_whose_score_is_not_known(tmp_path):
    path = tsv(tmp_path, "a\t0.5", "b\tn/a", header="sentence\tscore")
    found = load_examples(path, task="regression", require_labels=False)
    assert (found.labels, found.unlabelled) == ([0.5, 0.0], {1})
