"""Rows of one batch through different adapters: the same numbers as PEFT's adapter_names."""

import copy
from typing import Any

import pytest
import torch

import rankwise as rw
from twins import R, Two, copy_over, relative, shuffle, with_peft, with_rankwise

peft = pytest.importorskip("peft")

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("names", [["one", "two", None, "one"], ["two", "two", "one", "one"]])
def test_logits_are_those_of_adapter_names(names: list[str | None]):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
    )
    base = LlamaForCausalLM(config).double().eval()
    ours = copy.deepcopy(base)
    theirs = with_peft(base, **TARGETS)
    theirs.add_adapter("one", theirs.peft_config["default"])
    theirs.add_adapter("two", peft.LoraConfig(r=R - 1, lora_alpha=5, **TARGETS))
    with_rankwise(ours, "one", **TARGETS)
    with_rankwise(ours, "two", r=R - 1, alpha=5, **TARGETS)
    for i, name in enumerate(("one", "two")):
        shuffle(theirs, i, name)
        copy_over(theirs, ours, name)
    ids = torch.randint(0, 30, (4, 6))
    with torch.no_grad():
        there = theirs.eval()(ids, adapter_names=[n or "__base__" for n in names]).logits
        with rw.using_rows(ours, names):
            here = ours(ids).logits
        assert relative(here, there) < 1e-12
        with rw.using(ours):
            assert relative(ours(ids).logits, there) > 0.01


def test_what_is_refused_there():
    """DoRA and training; tests/attaching has both here."""
    theirs = with_peft(Two(), target_modules=["first"], use_dora=True)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        theirs.eval()(torch.ones(1, 12), adapter_names=["default"])
    theirs = with_peft(Two(), target_modules=["first"])
    with pytest.raises(ValueError, match=r"Cannot pass `adapter_names` when .* in training mode"):
        theirs.train()(torch.ones(1, 12), adapter_names=["default"])
