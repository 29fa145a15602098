"""What was added, and what is there now: the way back is exact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankwise.io.peft_entries import Paths
from rankwise.io.peft_extras import (
    Exact,
    absolute,
    added_by,
    bias_keys,
    bias_parameters,
    bias_within,
    biases_meant,
    change,
    frozen_rows,
    tokens_key,
)
from rankwise.io.peft_forms import Linear, Parameter, Plain
from rankwise.io.peft_fused import Attention
from rankwise.layers import Layout

FLOATS = st.floats(-1e4, 1e4, width=32)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=8))
def test_a_change_comes_back_to_the_last_bit(pairs: list[tuple[float, float]]):
    frozen = torch.tensor([b for b, _ in pairs])
    added = torch.tensor([d for _, d in pairs])
    back = change(frozen, absolute(frozen, added))
    exact = Exact()
    exact.keep("bias", "a.bias", added, back)
    assert torch.equal(exact.find("bias", "a.bias", back), added)
    lost = [d for b, d in pairs if d != 0 and abs(d) * 2**28 < abs(b)]
    if not lost:
        assert not exact.tensors


@given(st.lists(FLOATS, min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_a_bias_of_b_comes_back_to_the_last_bit(values: list[float], scale: float):
    added = torch.tensor(values)
    back = added_by(bias_within(added, scale), scale, torch.ones(1))
    assert torch.equal(back, added) or any(0 < abs(v) < 1e-30 for v in values)


def test_a_change_of_a_bfloat16_bias_is_held_in_float32():
    frozen = torch.tensor([1.0, -3.0]).bfloat16()
    added = torch.tensor([1e-5, 2.0])
    there = absolute(frozen, added)
    assert there.dtype == torch.float64
    assert change(frozen, there).dtype == torch.float32
    assert torch.equal(change(frozen, there), added)
    assert change(frozen.double(), there).dtype == torch.float64


def test_what_the_words_would_round_is_kept_by_itself():
    exact = Exact()
    frozen, added = torch.tensor([1.0]), torch.tensor([1e-30])
    back = change(frozen, absolute(frozen, added))
    assert not torch.equal(back, added)
    exact.keep("bias", "x", added, back)
    plain, kept = Exact.apart({"a": added, **exact.tensors})
    assert list(plain) == ["a"]
    assert torch.equal(kept.find("bias", "x", back), added)
    assert kept.tensors == {}
    odd = Exact({"rankwise.exact.bias.x": torch.ones(1, dtype=torch.int64)})
    assert odd.find("bias", "x", back) is back


class Some(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.bias = nn.Parameter(torch.ones(2, 2))
        self.head = nn.Linear(4, 4)


def test_biases_are_the_vectors_of_that_name_outside_what_trains_whole():
    modules = dict(Some().named_modules())
    del modules[""]
    assert list(bias_parameters(modules, ["head"])) == [
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "norm.bias",
    ]


def test_which_biases_a_file_of_peft_holds():
    biases = ["a.bias", "m.out_proj.bias", "m.in_proj_bias", "b.bias", "p.bias"]
    layout = Layout("weight", (2, 2))
    forms = [
        Linear("a", "a", {"a": layout}),
        Attention("m", "m", {}, output="m.out_proj", size=2),
        Parameter("p.w", "p", {"p.w": layout}),
        Plain("b", "b", {"b": layout}),
    ]
    assert biases_meant("none", forms, biases) == []
    assert biases_meant("lora_only", forms, biases) == ["a.bias", "m.out_proj.bias", "p.bias"]
    assert biases_meant("all", forms, biases) == [n for n in biases if n != "m.in_proj_bias"]


def test_which_forms_have_a_bias_of_b():
    layout = Layout("weight", (3, 2))
    assert bias_keys(Linear("a", "a", {"a": layout})) == {"lora_B.bias": (3,)}
    assert bias_keys(Linear("a", "a", {"a": layout}, embedding=True)) == {}
    assert bias_keys(Parameter("a.w", "a", {"a.w": layout})) == {}
    attention = Attention("m", "m", {}, output="m.out_proj", size=2)
    assert bias_keys(attention) == {
        "lora_B.bias": (6,),
        "base_layer.out_proj.lora_B.bias": (2,),
    }


def test_rows_of_an_embedding():
    embedding = nn.Embedding(5, 2)
    assert torch.equal(frozen_rows(embedding, (3, 1)), embedding.weight[[3, 1]])
    key = tokens_key("m.embed", Paths({"m": 1}))
    assert key == "m.base_layer.embed.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("scale", [1 / 3, math.pi])
def test_a_bias_of_b_has_the_effect_of_what_was_added(scale: float):
    added = torch.tensor([0.1, -7.0])
    torch.testing.assert_close(scale * bias_within(added, scale), added.double())
