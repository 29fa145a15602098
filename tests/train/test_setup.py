"""What a config makes of the data and of the checkpoint's head."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.errors import UserError
from rankwise.train.config import FitConfig
from rankwise.train.run import fit
from rankwise.train.setup import load_data

Options = Callable[..., FitConfig]

# -- the head --------------------------------------------------------------------------------------


def test_a_fresh_head_may_not_be_frozen(options: Options, tmp_path: Path) -> None:
    """It would be random, and saved nowhere."""
    with pytest.raises(UserError, match=r"--head freeze.*classifier\.bias.*--head train"):
        fit(options(tmp_path / "run", head="freeze"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def headed(bert: Path, tmp_path: Path) -> Path:
    """BERT with a head for two classes in its checkpoint."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    folder = tmp_path / "headed"
    BertForSequenceClassification.from_pretrained(bert, num_labels=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return folder


def test_a_head_of_the_checkpoint_may_be_frozen(
    options: Options, headed: Path, tmp_path: Path, look: Any
) -> None:
    run = fit(options(tmp_path / "run", model=str(headed), head="freeze", max_steps=2)).folder
    assert all("lora_" in name for name in look.tensors(run / "adapter"))
    assert look.manifest(run)["counts"]["head"] == 0


MOODS = {"1": "Good", "0": "Bad"}


@pytest.fixture
def moods(rows: Path, headed: Path, tmp_path: Path) -> dict[str, str]:
    """Rows labelled good and bad, and a checkpoint that was trained for Good and Bad, in its order,
    which is not the order of the alphabet.
    """
    found: dict[str, str] = {"model": str(headed)}
    for key, name in (("data", "train"), ("eval", "dev")):
        header, *lines = (rows / f"{name}.tsv").read_text().splitlines()
        cells = [line.split("\t") for line in lines]
        named = [f"{text}\t{MOODS[label].lower()}" for text, label in cells]
        (tmp_path / f"{name}.tsv").write_text("\n".join([header, *named]) + "\n")
        found[key] = str(tmp_path / f"{name}.tsv")
    file = headed / "config.json"
    classes = {"id2label": {"0": "Good", "1": "Bad"}, "label2id": {"Good": 0, "Bad": 1}}
    file.write_text(json.dumps(json.loads(file.read_text()) | classes))
    return found


def test_a_head_of_the_checkpoint_keeps_the_meaning_of_its_classes(
    options: Options, moods: dict[str, str], tmp_path: Path, look: Any
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rankwise.train.predict import examples_of_text, predict
    from rankwise.train.restore import restore

    run = fit(options(tmp_path / "run", head="freeze", max_steps=1, lr=1e-6, **moods)).folder
    assert look.manifest(run)["label_names"] == ["good", "bad"]
    model = AutoModelForSequenceClassification.from_pretrained(moods["model"]).eval()
    batch = AutoTokenizer.from_pretrained(moods["model"])("the warm film", return_tensors="pt")
    with torch.no_grad():
        shares = model(**batch).logits[0].softmax(-1).tolist()
    loaded = restore(run)
    row = predict(loaded, examples_of_text(loaded, ["the warm film"], [])).rows[0]
    assert row["probabilities"] == pytest.approx({"good": shares[0], "bad": shares[1]}, abs=1e-3)
    assert abs(shares[0] - shares[1]) > 0.01


def test_a_head_for_other_classes_is_told_and_may_not_be_frozen(
    options: Options, moods: dict[str, str], rows: Path, tmp_path: Path, look: Any, witness: Any
) -> None:
    other = {"model": moods["model"], "max_steps": 1}
    run = fit(options(tmp_path / "run", **other), reporter=witness).folder
    note = "The checkpoint's output layer was trained for other classes: Good, Bad."
    assert note in witness.text
    assert any(note in told for told in look.manifest(run)["notes"])
    with pytest.raises(UserError, match=r"--head freeze would keep.*Good, Bad.*--head train"):
        fit(options(tmp_path / "frozen", head="freeze", **other))
    assert not (tmp_path / "frozen").exists()


def test_a_language_model_s_missing_output_layer_trains(
    llama: Path, options: Options, rows: Path, tmp_path: Path, look: Any
) -> None:
    """LlamaModel without lm_head: a frozen random output layer would learn nothing."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    config = LlamaConfig.from_pretrained(llama)
    config.tie_word_embeddings = False
    LlamaModel(config).save_pretrained(tmp_path / "body")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "body")
    files = {"data": str(rows / "train.txt"), "eval": str(rows / "dev.txt")}
    run = fit(options(tmp_path / "run", model=str(tmp_path / "body"), max_steps=2, **files)).folder
    assert any("lm_head" in name for name in look.tensors(run / "adapter"))


def test_a_pooler_that_the_checkpoint_lacks_trains_and_is_saved(
    bert: Path, options: Options, tmp_path: Path, look: Any
) -> None:
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(bert, add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "bare")
    run = fit(options(tmp_path / "run", model=str(tmp_path / "bare"), max_steps=2)).folder
    assert look.manifest(run)["method"]["trained"] == ["classifier", "bert.pooler.dense"]


# -- data ------------------------------------------------------------------------------------------


def test_rows_are_held_out_when_there_is_no_evaluation_file(
    options: Options, rows: Path, tmp_path: Path
) -> None:
    data = load_data(options(tmp_path / "x", eval=None, eval_fraction=0.25))
    assert len(data.train) + len(data.held) == 48
    assert len(data.held) == pytest.approx(12, abs=2)
    assert any("No --eval was given" in note for note in data.notes)
    shared = {data.train.content(i) for i in range(len(data.train))}
    assert not shared & {data.held.content(i) for i in range(len(data.held))}


def test_train_rows_among_the_evaluation_rows_are_told(
    options: Options, rows: Path, tmp_path: Path, witness: Any
) -> None:
    config = options(tmp_path / "run", eval=str(rows / "train.tsv"), max_steps=1)
    fit(config, reporter=witness)
    assert "Leakage: 48 of 48" in witness.text
    assert "Trained whole and saved with the adapter: classifier" in witness.text
    assert "Base in float32 on cpu" in witness.text
