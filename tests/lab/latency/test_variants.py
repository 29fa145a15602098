"""The variants of one base: what is shared, what is added, and that each has an effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OpenAIGPTConfig

from rankwise.errors import UserError
from rankwise.lab.latency.variants import Models, make_models
from rankwise.train.config import make_config
from rankwise.train.skeleton import make_skeleton

PROBE = {"input_ids": torch.tensor([[3, 5, 7, 9]]), "attention_mask": torch.ones(1, 4).long()}


def made(folder: Path, **more: Any) -> Models:
    torch.manual_seed(0)
    model, _ = make_skeleton(str(folder), device="cpu")
    values = {"model": str(folder), "data": "", "out": ""}
    return make_models(model.requires_grad_(False), make_config(values | more, "test"), PROBE)


def test_each_variant_is_another_function_and_merged_is_that_of_lora(bert: Path) -> None:
    models = made(bert)
    with torch.no_grad():
        answers = {name: model(**PROBE).logits for name, model in models.by_name.items()}
    assert list(answers) == [
        *("plain", "merged", "LoRA, unmerged", "adapter, Houlsby", "adapter, Pfeiffer", "prefix")
    ]
    torch.testing.assert_close(answers.pop("merged"), answers["LoRA, unmerged"])
    found = list(answers.values())
    for i, one in enumerate(found):
        assert all(float((one - other).abs().max()) > 1e-6 for other in found[i + 1 :])


def test_the_parameters_added_are_those_of_the_papers(bert: Path) -> None:
    added = made(bert, r=4, adapter_size=6, prefix_length=5).added
    d, layers = 32, 2
    network = 2 * d * 6 + d + 6
    assert added["plain"] == added["merged"] == 0
    assert added["LoRA, unmerged"] == layers * 2 * 4 * (d + d)
    assert added["adapter, Pfeiffer"] == layers * network
    # behind attention and feed-forward; their normalisations train, and that of the embeddings
    assert added["adapter, Houlsby"] == layers * (2 * network + 2 * 2 * d) + 2 * d
    assert added["prefix"] == layers * 2 * 5 * d


def test_frozen_weights_are_held_once(gpt2: Path) -> None:
    models = made(gpt2)
    plain = {p.data_ptr() for p in models.by_name["plain"].parameters()}
    for name in ("LoRA, unmerged", "adapter, Houlsby", "prefix"):
        frozen = [p for p in models.by_name[name].parameters() if not p.requires_grad]
        assert frozen
        assert {p.data_ptr() for p in frozen} <= plain


def test_a_method_that_a_model_cannot_have_is_told(tmp_path: Path) -> None:
    """The first GPT computes its attention itself, so that no prefix can stand before it."""
    file = tmp_path / "config.json"
    OpenAIGPTConfig(
        vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=0
    ).to_json_file(file)
    models = made(file, target_modules="all-linear")
    assert list(models.by_name)[-1] == "adapter, Pfeiffer"
    (note,) = models.notes
    assert note.startswith("prefix is not measured: OpenAIGPT")


def test_targets_that_are_not_there_are_refused(bert: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'query'"):
        made(bert, target_modules="qury")
