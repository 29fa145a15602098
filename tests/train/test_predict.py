import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.errors import RankwiseError, UserError
from rankwise.train.predict import (
    Generation,
    Predictions,
    examples_of_file,
    examples_of_text,
    predict,
)
from rankwise.train.restore import Restored, restore

Finished = Callable[[str], Path]

TEXTS = ["the good film", "a dull old story of people and the house", "warm"]


@pytest.fixture(scope="module")
def restored(finished: Finished) -> Callable[[str], Restored]:
    made: dict[str, Restored] = {}

    def get(kind: str) -> Restored:
        return made.setdefault(kind, restore(finished(kind)))

    return get


@pytest.fixture(scope="module")
def plain(
    finished: Finished, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Any]]:
    """The merged model and tokenizer of a run, loaded by transformers alone."""
    import transformers

    from rankwise.train.export import merge_run

    made: dict[str, tuple[Any, Any]] = {}

    def get(kind: str) -> tuple[Any, Any]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("merged") / kind
            merge_run(finished(kind), folder)
            head = "SequenceClassification" if kind in ("single", "pair", "scores") else "CausalLM"
            loader = getattr(transformers, f"AutoModelFor{head}")
            model = loader.from_pretrained(folder).eval()
            made[kind] = model, transformers.AutoTokenizer.from_pretrained(folder)
        return made[kind]

    return get


def by_text(run: Restored, texts: list[str], pairs: list[str] | None = None) -> Predictions:
    return predict(run, examples_of_text(run, texts, pairs or []))


def test_labels_and_probabilities_are_the_merged_model_s(
    restored: Callable[[str], Restored], plain: Callable[[str], Any]
) -> None:
    made = by_text(restored("single"), TEXTS)
    model, tokenizer = plain("single")
    assert made.metrics is None
    assert [row["row"] for row in made.rows] == [1, 2, 3]
    for text, row in zip(TEXTS, made.rows, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        wanted = logits.softmax(-1)
        assert list(row["probabilities"]) == ["0", "1"]
        assert list(row["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)
        assert row["label"] == model.config.id2label[int(wanted.argmax())]


def test_a_pair_is_two_texts(
    restored: Callable[[str], Restored], plain: Callable[[str], Any]
) -> None:
    made = by_text(restored("pair"), ["the good film"], ["a bad story"])
    model, tokenizer = plain("pair")
    batch = tokenizer("the good film", "a bad story", return_tensors="pt")
    assert batch["token_type_ids"].unique().tolist() == [0, 1]
    with torch.no_grad():
        wanted = model(**batch).logits[0].softmax(-1)
    row = made.rows[0]
    assert list(row["probabilities"]) == ["other", "same"]
    assert list(row["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_score_is_the_merged_model_s(
    restored: Callable[[str], Restored], plain: Callable[[str], Any]
) -> None:
    made = by_text(restored("scores"), TEXTS)
    model, tokenizer = plain("scores")
    for text, row in zip(TEXTS, made.rows, strict=True):
        with torch.no_grad():
            wanted = model(**tokenizer(text, return_tensors="pt")).logits.item()
        assert row["score"] == pytest.approx(wanted, abs=1e-5)
        assert row.keys() == {"row", "score"}


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_file_with_labels_is_measured(
    restored: Callable[[str], Restored], rows: Path, batch_size: int
) -> None:
    run = restored("single")
    made = predict(run, examples_of_file(run, str(rows / "dev.tsv")), batch_size=batch_size)
    lines = (rows / "dev.tsv").read_text().splitlines()[1:]
    labels = [line.split("\t")[1] for line in lines]
    right = [row["label"] == label for row, label in zip(made.rows, labels, strict=True)]
    assert made.metrics is not None
    assert made.metrics["accuracy"] == pytest.approx(np.mean(right))
    losses = [
        -math.log(row["probabilities"][label]) for row, label in zip(made.rows, labels, strict=True)
    ]
    assert made.metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)


def test_a_file_without_labels_is_not(
    restored: Callable[[str], Restored], rows: Path, tmp_path: Path
) -> None:
    run = restored("single")
    lines = (rows / "dev.tsv").read_text().splitlines()[1:]
    texts = [line.split("\t")[0] for line in lines]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    bare = predict(run, examples_of_file(run, str(tmp_path / "texts.jsonl")))
    assert bare.metrics is None
    assert bare.rows == by_text(run, texts).rows
    assert bare.rows == predict(run, examples_of_file(run, str(rows / "dev.tsv"))).rows


@pytest.mark.parametrize(
    ("kind", "texts", "pairs", "message"),
    [
        ("single", ["the film", " "], [], "--text is empty"),
        ("single", ["the film"], ["a story"], "leave --pair out"),
        ("pair", ["the film"], [], "one --pair for each --text"),
        ("pair", ["a", "b"], ["c"], "one --pair for each --text"),
        ("gpt2", [""], [], "--text is empty"),
    ],
)
def test_texts_that_do_not_fit(
    restored: Callable[[str], Restored],
    kind: str,
    texts: list[str],
    pairs: list[str],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        by_text(restored(kind), texts, pairs)


@pytest.mark.parametrize(
    ("kind", "name"), [("single", "dev-pairs.tsv"), ("prompts", "dev-chats.jsonl")]
)
def test_a_file_of_another_form_is_refused(
    restored: Callable[[str], Restored], rows: Path, kind: str, name: str
) -> None:
    with pytest.raises(RankwiseError) as caught:
        examples_of_file(restored(kind), str(rows / name))
    assert caught.value.exit_code == 2
    assert name in str(caught.value)


def test_rows_without_a_label_are_predicted_and_not_measured(
    restored: Callable[[str], Restored], rows: Path, tmp_path: Path, witness: Any
) -> None:
    run = restored("single")
    header, *lines = (rows / "dev.tsv").read_text().splitlines()
    broken = [f"{line[:-1]}-" if i % 3 == 1 else line for i, line in enumerate(lines)]
    (tmp_path / "some.tsv").write_text("\n".join([header, *broken]) + "\n")
    made = predict(run, examples_of_file(run, str(tmp_path / "some.tsv")), reporter=witness)
    assert made.rows == predict(run, examples_of_file(run, str(rows / "dev.tsv"))).rows
    kept = [line for line in broken if not line.endswith("-")]
    (tmp_path / "kept.tsv").write_text("\n".join([header, *kept]) + "\n")
    alone = predict(run, examples_of_file(run, str(tmp_path / "kept.tsv")))
    assert (made.measured, alone.measured) == (14, 14)
    assert made.metrics == pytest.approx(alone.metrics, rel=1e-6)
    assert "7 of 21 rows have no known label in 'label'" in witness.text


def test_notes_on_the_file_and_on_its_rows_are_told(
    restored: Callable[[str], Restored], tmp_path: Path, witness: Any
) -> None:
    (tmp_path / "rows.tsv").write_text("id\twords\n1\tthe good film\n2\t" + "old " * 80 + "film\n")
    run = restored("single")
    predict(run, examples_of_file(run, str(tmp_path / "rows.tsv")), reporter=witness)
    assert "the text is read from 'words'" in witness.text
    assert "1 of 2 rows are longer than 64 tokens" in witness.text


# -- language models ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "prompts", "tied"])
def test_a_continuation_is_the_merged_model_s_own(
    restored: Callable[[str], Restored], plain: Callable[[str], Any], kind: str
) -> None:
    """Rows of unequal length are padded on the left, and that must not change a token."""
    run = restored(kind)
    made = predict(run, examples_of_text(run, TEXTS, []), generation=Generation(12))
    model, tokenizer = plain(kind)
    for text, row in zip(TEXTS, made.rows, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )[0, ids.shape[1] :]
        assert row == {
            "row": row["row"],
            "generated": tokenizer.decode(wanted, skip_special_tokens=True),
        }


def test_a_conversation_is_written_in_the_model_s_chat_template(
    restored: Callable[[str], Restored], plain: Callable[[str], Any]
) -> None:
    run = restored("llama")
    made = predict(run, examples_of_text(run, TEXTS, []), generation=Generation(10))
    model, tokenizer = plain("llama")
    for text, row in zip(TEXTS, made.rows, strict=True):
        asked = f"<user>{text}<assistant>"
        ids = tokenizer(asked, return_tensors="pt")["input_ids"]
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )[0, ids.shape[1] :]
        assert row["generated"] == tokenizer.decode(wanted, skip_special_tokens=True)


def test_drawing_depends_on_the_seed_alone(restored: Callable[[str], Restored]) -> None:
    run = restored("gpt2")
    examples = examples_of_text(run, TEXTS, [])

    def draw(seed: int) -> list[str]:
        made = predict(run, examples, generation=Generation(12, temperature=1.5, seed=seed))
        return [row["generated"] for row in made.rows]

    first = draw(1)
    torch.manual_seed(99)
    assert draw(1) == first
    assert draw(2) != first


def test_given_completions_are_measured_by_perplexity(
    restored: Callable[[str], Restored], rows: Path, look: Any, finished: Finished
) -> None:
    run = restored("prompts")
    examples = examples_of_file(run, str(rows / "dev-prompts.jsonl"))
    made = predict(run, examples, generation=Generation(2))
    assert len(made.rows) == 21
    wanted = look.manifest(finished("prompts"))["metrics"]["perplexity"]
    assert made.metrics is not None
    assert made.metrics["perplexity"] == pytest.approx(wanted, rel=1e-5)
    bare = predict(run, examples_of_text(run, TEXTS, []), generation=Generation(2))
    assert bare.metrics is None


def test_completions_that_some_rows_lack(
    restored: Callable[[str], Restored], rows: Path, tmp_path: Path, witness: Any
) -> None:
    run = restored("prompts")
    read = [json.loads(line) for line in (rows / "dev-prompts.jsonl").read_text().splitlines()]
    some = [row if i % 2 else row | {"completion": ""} for i, row in enumerate(read)]

    def measured(name: str, made: list[dict[str, str]]) -> Predictions:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in made))
        examples = examples_of_file(run, str(tmp_path / name))
        return predict(run, examples, generation=Generation(2), reporter=witness)

    found = measured("some.jsonl", some)
    assert "10 of 21 rows hold a completion" in witness.text
    assert [row["row"] for row in found.rows] == list(range(1, 22))
    alone = measured("alone.jsonl", read[1::2])
    assert (found.measured, alone.measured) == (10, 10)
    assert found.metrics == pytest.approx(alone.metrics, rel=1e-6)


def test_completions_beyond_the_length_leave_the_text(
    restored: Callable[[str], Restored], tmp_path: Path, witness: Any
) -> None:
    run = restored("prompts")
    row = {"prompt": "old " * 40, "completion": " film"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    examples = examples_of_file(run, str(tmp_path / "long.jsonl"))
    made = predict(run, examples, generation=Generation(2), reporter=witness)
    assert (len(made.rows), made.metrics) == (1, None)
    assert "There are no metrics." in witness.text


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_request_for_more_than_the_model_takes_is_cut_and_told(
    restored: Callable[[str], Restored], witness: Any, kind: str
) -> None:
    """GPT-2 here takes 96 tokens; without a limit its position embedding would be overrun."""
    run = restored(kind)
    long = " ".join(TEXTS * 4)
    made = predict(
        run,
        examples_of_text(run, [long], []),
        generation=Generation(10_000),
        reporter=witness,
    )
    half = {"gpt2": 48, "llama": 64}[kind]
    assert f"at most {half} are generated" in witness.text
    assert f"longer than {half} tokens" in witness.text
    assert len(made.rows[0]["generated"]) <= half


def test_the_device_is_chosen_or_refused(restored: Callable[[str], Restored]) -> None:
    run = restored("single")
    examples = examples_of_text(run, TEXTS, [])
    assert len(predict(run, examples, device="cpu").rows) == 3
    if not torch.cuda.is_available():
        with pytest.raises(RankwiseError, match="cuda"):
            predict(run, examples, device="cuda")
