"""Models without weights: from a folder, from a file of any name, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, LlamaConfig, ViTConfig

from rankwise.errors import ArtifactError, UserError
from rankwise.train.skeleton import make_skeleton


def test_the_skeleton_has_the_shapes_of_the_model_and_no_weights(bert: Path) -> None:
    model, task = make_skeleton(str(bert), labels=5)
    assert task == "classification"
    assert all(p.is_meta for p in model.parameters())
    real = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=5)
    shapes = {name: tuple(p.shape) for name, p in real.named_parameters()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes


def test_a_file_of_any_name_is_as_good_as_its_folder(bert: Path, tmp_path: Path) -> None:
    shutil.copy(bert / "config.json", tmp_path / "mine.json")
    shapes = [
        {name: p.shape for name, p in make_skeleton(str(source))[0].named_parameters()}
        for source in (bert, bert / "config.json", tmp_path / "mine.json")
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_the_task_is_that_of_the_architecture_or_the_one_asked_for(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        architectures=["LlamaForCausalLM"],
    )
    config.to_json_file(tmp_path / "llama.json")
    model, task = make_skeleton(str(tmp_path / "llama.json"))
    assert (type(model).__name__, task) == ("LlamaForCausalLM", "causal-lm")
    model, task = make_skeleton(str(tmp_path / "llama.json"), "regression", labels=7)
    assert task == "regression"
    assert model.get_submodule("score").weight.shape == (1, 8)


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text, kind, words in (
        ("{", ArtifactError, "not readable JSON"),
        ("[]", ArtifactError, "holds a list"),
        ('{"model_type": "brt"}', UserError, "Did you mean 'bert'"),
        ('{"model_type": "bert", "auto_map": {"a": "b"}}', UserError, "asks to run code"),
        ('{"model_type": "bert", "hidden_size": "x"}', ArtifactError, "is damaged"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(kind, match=words):
            make_skeleton(str(file))


def test_an_architecture_without_the_task_is_refused(tmp_path: Path) -> None:
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2).to_json_file(
        tmp_path / "vit.json"
    )
    with pytest.raises(UserError, match="cannot be had for the task causal-lm"):
        make_skeleton(str(tmp_path / "vit.json"), "causal-lm")


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="Did you mean"):
        make_skeleton(str(tmp_path / "modle"))
