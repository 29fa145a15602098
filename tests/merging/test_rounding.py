"""The bounds of rounding: honest merges stay inside, small faults fall outside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.layers import Spec, wrap
from rankwise.merging.fold import plain
from rankwise.merging.rounding import check_layer, check_weight

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["linear", "conv", "embedding"]


def layer_of(kind, in_features, out_features, r, dtype, size, alpha=8.0, seed=0):
    """An adapted layer with random factors; ``size`` is the scale of the trained factor."""
    torch.manual_seed(seed)
    base = {
        "linear": lambda: nn.Linear(in_features, out_features),
        "conv": lambda: Conv1D(out_features, in_features),
        "embedding": lambda: nn.Embedding(in_features, out_features),
    }[kind]()
    layer = wrap(base.to(dtype), Spec(r, alpha))
    grown = layer.update.lora_A if kind == "embedding" else layer.update.lora_B
    grown.data.copy_(torch.randn(grown.shape) * size)
    return layer


def rows_of(kind, layer, n, size=1.0):
    if kind == "embedding":
        return torch.randint(layer.num_embeddings, (n,))
    return (torch.randn(n, layer.in_features) * size).to(layer.base_layer.weight.dtype)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    in_features=st.integers(1, 300),
    out_features=st.integers(1, 300),
    r=st.integers(1, 12),
    n=st.integers(1, 40),
    powers=st.tuples(st.integers(-6, 0), st.integers(-3, 1)),
    alpha=st.sampled_from([0.1, 1.0, 7.0, 64.0]),
    seed=st.integers(0, 2**16),
)
def test_an_honest_merge_is_never_refused(
    kind, dtype, in_features, out_features, r, n, powers, alpha, seed
):
    grown, input_size = (10.0**p for p in powers)
    layer = layer_of(kind, in_features, out_features, r, dtype, grown, alpha, seed)
    with torch.no_grad():
        check = check_layer("x", layer, "weight", plain(layer), rows_of(kind, layer, n, input_size))
    assert check.problem() is None
    assert check.error <= check.bound
    assert check.lost <= 1.0001  # W0 itself is never nearer than the rounded sum


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    width=st.integers(2, 400),
    r=st.integers(1, 8),
    percent=st.sampled_from([-1.0, 1.0, 0.1]),
)
def test_a_scale_that_is_slightly_wrong_is_refused(kind, dtype, width, r, percent):
    layer = layer_of(kind, width, width + 3, r, dtype, 0.02)
    honest = layer.update.scale
    layer.update.scale = honest * (1 + percent / 100)
    wrong = plain(layer)
    layer.update.scale = honest
    with torch.no_grad():
        check = check_layer("x", layer, "weight", wrong, None)
    assert not check.passed
    assert "not W0 + δ rounded once" in check.problem()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_percent_is_seen_in_short_dtypes_too(kind, dtype):
    layer = layer_of(kind, 64, 48, 4, dtype, 0.1)
    honest = layer.update.scale
    layer.update.scale = honest * 1.01
    wrong = plain(layer)
    layer.update.scale = honest
    with torch.no_grad():
        assert not check_layer("x", layer, "weight", wrong, None).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_update_computed_in_the_short_dtype_is_refused(dtype):
    layer = layer_of("linear", 64, 48, 4, dtype, 0.1)
    short = (layer.update.lora_B.to(dtype) @ layer.update.lora_A.to(dtype)) * layer.update.scale
    ratio, *_ = check_weight(layer, "weight", (layer.base_layer.weight + short).detach())
    assert ratio > 1
    ratio, *_ = check_weight(layer, "weight", plain(layer).weight)
    assert ratio <= 1


def test_a_transposed_update_is_refused():
    layer = layer_of("linear", 20, 20, 3, torch.float32, 0.1)
    wrong = plain(layer)
    wrong.weight.data = layer.base_layer.weight + layer.update.factors().delta().T
    with torch.no_grad():
        assert not check_layer("x", layer, "weight", wrong, None).passed


def test_a_wrong_bias_is_refused_by_the_outputs():
    layer = layer_of("linear", 20, 20, 3, torch.float32, 0.1)
    wrong = plain(layer)
    wrong.bias = nn.Parameter(wrong.bias + 1e-4)
    with torch.no_grad():
        check = check_layer("x", layer, "weight", wrong, None)
    assert check.weight_ratio <= 1 < check.ratio
    assert "the outputs of x change by up to 0.0001" in check.problem()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    layer = layer_of("linear", 20, 20, 3, torch.float32, 0.1)
    layer.update.lora_A.data[1, 2] = bad
    with torch.no_grad():
        check = check_layer("x", layer, "weight", plain(layer), None)
    assert not check.finite
    assert "lora_A" in check.problem()


def test_the_measures_are_those_of_the_formulas():
    layer = layer_of("linear", 30, 20, 3, torch.bfloat16, 0.002)
    x = rows_of("linear", layer, 9)
    merged = plain(layer)
    with torch.no_grad():
        check = check_layer("x", layer, "weight", merged, x)
        base = layer.base_layer.weight.double()
        delta = layer.update.scale * layer.update.lora_B.double() @ layer.update.lora_A.double()
        kept = merged.weight.double() - base
        apart = (merged(x).double() - layer(x).double()).abs()
    assert check.update == pytest.approx(float(delta.norm()))
    assert check.lost == pytest.approx(float((kept - delta).norm() / delta.norm()))
    assert 0.05 < check.lost < 1
    assert check.effect == pytest.approx(float((x.double() @ delta.T).abs().max()))
    assert check.error == pytest.approx(float(apart.max()))
