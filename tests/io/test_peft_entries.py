"""Forms and paths: compared with the keys of PEFT's own files."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft_models import Convolutions, Flat, Heads, Mixture, gpt2, make
from rankwise.io.peft_entries import Paths, attention_of, forms_of, packed_attention
from rankwise.io.sketch import own_modules
from rankwise.layers import Split
from rankwise.targets import targets_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
]


def chosen(model: nn.Module, names: list[str], **options: Any):
    every = targets_of(model, options.pop("split", None))
    return forms_of({n: every[n] for n in names}, own_modules(model), **{"dora": False, **options})


CASES = {
    "linear": (Flat, {"target_modules": ["up", "down"]}, ["up", "down"]),
    "conv1d": (gpt2, {"target_modules": ["0.mlp.c_fc"]}, ["transformer.h.0.mlp.c_fc"]),
    "embedding": (Flat, {"target_modules": ["embed"]}, ["embed"]),
    "convolutions": (Convolutions, {"target_modules": ["one", "two"]}, ["one", "two"]),
    "attention": (
        Heads,
        {"target_modules": ["first"]},
        ["first.q_proj", "first.k_proj", "first.v_proj", "first.out_proj"],
    ),
    "a part of attention": (Heads, {"target_modules": ["first"]}, ["first.v_proj"]),
    "parameters": (
        Mixture,
        {
            "target_modules": ["0.experts.inner"],
            "target_parameters": ["0.experts.down", "0.experts.up"],
        },
        ["blocks.0.experts.down", "blocks.0.experts.inner", "blocks.0.experts.up"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_keys_and_shapes_are_those_of_peft(tmp_path: Path, case: str):
    build, options, names = CASES[case]
    config = peft.LoraConfig(r=2, **options)
    peft.get_peft_model(make(build), config).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    forms, _ = chosen(make(build), names)
    mine = {
        f"base_model.model.{form.path}.{key}": wanted.shape
        for form in forms
        for key, wanted in form.wanted(2).items()
    }
    factors = {key: tuple(t.shape) for key, t in theirs.items() if ".base_layer.weight" not in key}
    assert mine == factors


def test_a_tensor_of_the_base_is_behind_its_wrappers():
    paths = Paths({"a": 2, "a.b": 1, "c": 1})
    assert paths.outer("a.b.d") == "a.base_layer.base_layer.b.base_layer.d"
    assert paths.outer("a") == "a"
    assert paths.inner("a") == "a.base_layer.base_layer"
    assert paths.tensor("a.b.bias") == "a.base_layer.base_layer.b.base_layer.bias"
    assert paths.tensor("e.weight") == "e.weight"
    assert paths.tensor("weight") == "weight"


def test_the_biases_of_a_wrapped_model_are_where_peft_has_them():
    model = make(Mixture)
    config = peft.LoraConfig(
        r=2, target_modules=["inner"], target_parameters=["experts.up", "experts.down"]
    )
    theirs = peft.get_peft_model(make(Mixture), config).state_dict()
    names = [f"blocks.{i}.experts.{n}" for i in (0, 1) for n in ("up", "down", "inner")]
    _, paths = chosen(model, names)
    for name, tensor in model.named_parameters():
        assert torch.equal(theirs[f"base_model.model.{paths.tensor(name)}"], tensor)


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.packed = nn.MultiheadAttention(8, 2)
        self.fused = nn.Linear(8, 12)
        self.conv = nn.Conv1d(8, 8, 1, groups=2)
        self.bank = nn.ParameterDict({"w": nn.Parameter(torch.ones(2, 3, 4))})


def kinds(names: list[str], **options: Any) -> dict[str, str]:
    forms, _ = chosen(Apart(), names, **options)
    return {form.target: type(form).__name__ for form in forms}


def test_what_peft_has_no_form_for_stays_plain():
    split = {"fused": Split(("a", "b"))}
    names = [
        "inner.k_proj",
        "inner.out_proj",
        "packed.q_proj",
        "packed.out_proj",
        "conv",
        "fused.b",
    ]
    assert kinds(names, split=split) == {
        "inner.k_proj": "Plain",
        "inner.out_proj": "Plain",
        "packed": "Attention",
        "conv": "Convolution",
        "fused": "Projection",
    }
    assert kinds(names, split=split, dora=True) == {
        **dict.fromkeys(
            ("inner.k_proj", "inner.out_proj", "packed.q_proj", "packed.out_proj", "conv"), "Plain"
        ),
        "fused": "Projection",
    }


def test_what_peft_was_told_in_another_way_is_read_so():
    assert kinds(["packed.out_proj"], alone={"packed.out_proj"}) == {"packed.out_proj": "Linear"}
    assert kinds(["fused"], turned={"fused"}) == {"fused.weight": "Parameter"}


def test_an_attention_is_told_by_its_module():
    modules = own_modules(Apart())
    assert packed_attention(modules["packed"])
    assert not packed_attention(modules["inner"])
    assert not packed_attention(modules["fused"])
    assert attention_of("inner.out_proj", modules) == "inner"
    assert attention_of("fused", modules) is None
