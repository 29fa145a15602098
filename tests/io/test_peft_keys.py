"""Names of tensors, whatever stood in them."""

import pytest
import torch

from rankwise.io.peft_keys import named

T = torch.ones(1)
CASES = {
    "as PEFT writes it": ("base_model.model.a.b.lora_A.weight", "a.b.lora_A.weight"),
    "without prefix": ("a.b.lora_A.weight", "a.b.lora_A.weight"),
    "compiled inside": ("base_model.model._orig_mod.a.lora_B.weight", "a.lora_B.weight"),
    "compiled outside": ("_orig_mod.base_model.model.a.lora_B.weight", "a.lora_B.weight"),
    "in parallel": ("module.base_model.model.a.lora_B.weight", "a.lora_B.weight"),
    "sharded": ("base_model.model.a._fsdp_wrapped_module.b.weight", "a.b.weight"),
    "with the adapter's name": ("base_model.model.a.lora_A.default.weight", "a.lora_A.weight"),
    "a bias with it": ("base_model.model.a.lora_B.poet.bias", "a.lora_B.bias"),
    "an embedding with it": ("base_model.model.a.lora_embedding_A.poet", "a.lora_embedding_A"),
    "a magnitude with it": (
        "base_model.model.a.lora_magnitude_vector.poet.weight",
        "a.lora_magnitude_vector",
    ),
    "an old magnitude": (
        "base_model.model.a.lora_magnitude_vector.weight",
        "a.lora_magnitude_vector",
    ),
    "rows with it": (
        "base_model.model.e.token_adapter.trainable_tokens_delta.poet",
        "e.token_adapter.trainable_tokens_delta",
    ),
    "rows without": (
        "base_model.model.e.token_adapter.trainable_tokens_delta",
        "e.token_adapter.trainable_tokens_delta",
    ),
    "none of PEFT's": ("base_model.model.head.weight", "head.weight"),
    "nested wrappers": (
        "base_model.model.e.base_layer.lora_A.weight",
        "e.base_layer.lora_A.weight",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_name_is_brought_into_one_form(case: str):
    key, expected = CASES[case]
    found = named({key: T})
    assert list(found.tensors) == [expected]
    assert found.tensors[expected] is T
    assert found.problems == ()


def test_what_was_done_is_told_once():
    keys = [f"_orig_mod.base_model.model.{i}.lora_A.poet.weight" for i in range(3)]
    assert named(dict.fromkeys(keys, T)).changes == (
        "'_orig_mod.' of torch.compile was taken out",
        "the adapter's name 'poet' was taken out",
    )


def test_two_adapters_or_two_spellings_are_problems():
    mixed = {"base_model.model.a.lora_A.x.weight": T, "base_model.model.a.lora_B.y.weight": T}
    assert named(mixed).problems == (
        "its names mix several adapters ('x', 'y'); save one of them alone.",
    )
    twice = {"base_model.model.a.lora_A.x.weight": T, "base_model.model.a.lora_A.weight": T}
    assert "occurs twice, in two spellings" in named(twice).problems[0]


def test_a_module_that_is_called_module_keeps_its_name():
    keys = {"base_model.model.module.a.lora_A.weight": T, "base_model.model.b.lora_A.weight": T}
    assert list(named(keys).tensors) == ["module.a.lora_A.weight", "b.lora_A.weight"]
