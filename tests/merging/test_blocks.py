"""W0 + L R in blocks: the exact sum rounded once, whatever the block, layout and adapters."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise.attaching import lora_layers
from rankwise.layers import Spec, wrap
from rankwise.merging.blocks import Sum, held, sum_of, widened
from rankwise.merging.fold import plain, streamed


def of(kind: str, dtype: torch.dtype):
    torch.manual_seed(0)
    base = {
        "linear": lambda: nn.Linear(33, 21),
        "conv": lambda: Conv1D(21, 33),
        "embedding": lambda: nn.Embedding(33, 21),
    }[kind]()
    layer = wrap(base.to(dtype), Spec(4, 6.0))
    for factor in (layer.update.lora_A, layer.update.lora_B):
        factor.data.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("size", [1, 100, 2**19])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_all_of_it_is_the_exact_sum_rounded_once(kind, dtype, size):
    layer = of(kind, dtype)
    stored = layer.base_weight("weight")
    with torch.no_grad():
        found = sum_of(layer, "weight", stored).whole(size)
        delta = layer.update.lora_B.double().numpy() @ layer.update.lora_A.double().numpy() * 1.5
    exact = stored.double().numpy() + (delta if kind == "linear" else delta.T)
    assert found.dtype == dtype
    off = np.abs(found.double().numpy() - exact)
    wide = 1e-6 if dtype != torch.float64 else 1e-15
    assert (off <= torch.finfo(dtype).eps / 2 * np.abs(exact) + wide).all()


def test_adapters_add_up_and_what_is_more_than_a_product_is_left_to_others():
    model = nn.Sequential(nn.Linear(8, 6))
    for name in ("one", "two"):
        rankwise.attach(model, rankwise.LoRA(r=2, target_modules=["0"]), name=name)
    (layer,) = lora_layers(model).values()
    for update in layer.updates.values():
        update.lora_B.data.normal_()
    stored = layer.base_weight("weight")
    with torch.no_grad():
        expected = stored + sum(u.factors().delta() for u in layer.updates.values())
        total = sum_of(layer, "weight", stored)
        torch.testing.assert_close(total.whole(), expected)
    assert total.norm() == pytest.approx(float((expected - stored).norm()), rel=1e-5)
    dora = wrap(nn.Linear(8, 6), Spec(2, 4.0, dora=True))
    assert sum_of(dora, "weight", dora.base_weight("weight")) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_some_places_are_those_of_the_whole(axis):
    layer = of("linear", torch.float64)
    with torch.no_grad():
        total = sum_of(layer, "weight", layer.base_weight("weight"))
        places = torch.tensor([0, 5, 20])
        torch.testing.assert_close(
            total.at(places, axis).whole(), total.whole().index_select(axis, places)
        )


def test_surely_finite_is_never_said_of_what_is_not():
    left, right = torch.ones(3, 1), torch.ones(1, 4)
    assert Sum(torch.ones(3, 4), left, right).surely_finite()
    for bad in (float("nan"), float("inf"), -float("inf")):
        stored = torch.ones(3, 4)
        stored[1, 2] = bad
        assert not Sum(stored, left, right).surely_finite()
        assert not Sum(torch.ones(3, 4), left * bad, right).surely_finite()
    assert not Sum(torch.full((3, 4), 65000.0).half(), left * 600, right).surely_finite()


def test_a_weight_that_is_computed_when_read_is_not_held():
    layer = of("linear", torch.float32)
    with torch.no_grad():
        assert held(streamed(layer), "weight") is None
        assert torch.equal(held(plain(layer), "weight"), streamed(layer).weight)


def test_rows_are_widened_into_the_buffer_only_where_they_are_short():
    buffer, rows = torch.empty(4, 3), torch.ones(2, 3)
    assert widened(rows, buffer) is rows
    assert widened(rows.bfloat16(), buffer).data_ptr() == buffer.data_ptr()
