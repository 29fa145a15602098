"""A base's files tell names, shapes and numbers without being run or read whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import blueprint, blueprint_of


def test_a_model_folder_says_what_the_model_says(llama: Path):
    from foreign import load

    there, model = blueprint(llama), blueprint_of(load(llama))
    assert there.config["model_type"] == model.config["model_type"] == "llama"
    assert there.number("num_key_value_heads") == 1
    assert "model.layers.1.self_attn.q_proj" in there.names
    assert set(there.names) <= set(model.names)  # the output is tied and not in the file
    assert all(model.shapes[name] == shape for name, shape in there.shapes.items())
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(there.fetch(key), model.fetch(key))


def test_a_config_alone_has_no_numbers(llama: Path):
    there = blueprint(llama / "config.json")
    assert there.number("num_hidden_layers") == 2
    assert there.names == ()
    with pytest.raises(UserError, match="only a config of the base was given"):
        there.fetch("model.norm.weight")


def test_a_number_that_is_missing_is_said(tmp_path: Path):
    config = {"text_config": {"num_attention_heads": 4}, "n_layer": 0, "x": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    there = blueprint(tmp_path)
    assert there.number("num_attention_heads") == 4
    for key in ("n_layer", "x", "num_hidden_layers"):
        with pytest.raises(UserError, match=f"says no {key}"):
            there.number(key)


def test_shards_are_one_base(tmp_path: Path):
    save_file({"a.weight": torch.ones(2, 3)}, tmp_path / "m-1.safetensors")
    save_file({"b.weight": torch.zeros(4), "b.bias": torch.ones(1)}, tmp_path / "m-2.safetensors")
    there = blueprint(tmp_path)
    assert there.names == ("a", "b")
    assert there.shapes["a.weight"] == (2, 3)
    assert torch.equal(there.fetch("b.weight"), torch.zeros(4))


def test_what_is_no_base_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="says nothing about a base"):
        blueprint(tmp_path)
    with pytest.raises(UserError, match="There is no"):
        blueprint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ArtifactError, match="must be a JSON object"):
        blueprint(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "x.safetensors").write_bytes(b"\x10" + b"\0" * 40)
    with pytest.raises(ArtifactError, match="not a valid safetensors file"):
        blueprint(tmp_path)


def test_a_damaged_file_does_not_give_numbers(tmp_path: Path):
    save_file({"a.weight": torch.ones(200, 30)}, tmp_path / "m.safetensors")
    there = blueprint(tmp_path)
    (tmp_path / "m.safetensors").write_bytes(b"gone")
    with pytest.raises(ArtifactError, match=r"does not give its tensor 'a.weight'"):
        there.fetch("a.weight")
