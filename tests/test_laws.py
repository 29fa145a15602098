"""Laws over random shapes, ranks, dtypes and geometries, searched by hypothesis."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.layers import LoRALayer

MODES = ["zeros", "reflect", "replicate", "circular"]
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Holder(nn.Module):
    """One layer; attention is run on its one input three times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, need_weights=False)[0]
        return self.layer(x)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor, tuple[str, ...]]:
    """A convolution of any geometry and an input that it accepts."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    inner, outer = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    pick = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    stride = [draw(st.integers(1, 2)) for _ in range(dims)]
    mode = draw(st.sampled_from(MODES))
    reach = [d * (k - 1) for k, d in zip(pick, dilation, strict=True)]
    padding = [draw(st.integers(0, 2)) for _ in range(dims)]
    size = [max(r, p) + 2 for r, p in zip(reach, padding, strict=True)]
    layer = CONVOLUTIONS[dims - 1](
        inner, outer, pick, stride, padding, dilation, groups,
        bias=draw(st.booleans()), padding_mode=mode,
    )  # fmt: skip
    batch = [2] if draw(st.booleans()) else []
    return layer, torch.randn(*batch, inner, *size), ("layer",)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[nn.Module, Tensor, tuple[str, ...]]:
    """A Linear, an Embedding, an attention or a fused projection, and an input."""
    inner, outer = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    lead = draw(st.sampled_from([(), (3,), (2, 3)]))
    kind = draw(st.sampled_from(["linear", "embedding", "attention"]))
    if kind == "linear":
        return nn.Linear(inner, outer, draw(st.booleans())), torch.randn(*lead, inner), ("layer",)
    if kind == "embedding":
        return nn.Embedding(inner, outer), torch.randint(inner, lead), ("layer",)
    size = 2 * inner
    layer = nn.MultiheadAttention(size, 2, bias=draw(st.booleans()), batch_first=True)
    parts = draw(st.sets(st.sampled_from(["q_proj", "k_proj", "v_proj", "out_proj"]), min_size=1))
    return layer, torch.randn(2, 3, size), tuple(sorted(parts))


LAYERS = st.one_of(convolutions(), matrices())
RANKS = st.integers(1, 4)


def adapted(
    case: tuple[nn.Module, Tensor, tuple[str, ...]], r: int, dtype: torch.dtype, **options: Any
) -> tuple[Holder, Tensor]:
    """A holder of the layer with a trained update on it, and its input."""
    layer, x, targets = case
    model = Holder(layer).to(dtype).requires_grad_(False).eval()
    rw.attach(model, rw.LoRA(r=r, target_modules=targets, head="freeze", **options))
    with torch.no_grad():
        for update in updates_of(model).values():
            for p in update.trained():
                p.add_(torch.randn_like(p) * 0.3)
    return model, x.to(dtype) if x.is_floating_point() else x


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@settings(max_examples=150, deadline=None)
@given(LAYERS, RANKS, st.sampled_from(DTYPES), st.booleans())
def test_merged_equals_unmerged(case: Any, r: int, dtype: torch.dtype, dora: bool):
    model, x = adapted(case, r, dtype, dora=dora)
    before = run(model, x)
    certificate = rw.merge(model)
    assert certificate.passed or certificate.dtype == "bfloat16"
    assert all(layer.passed for layer in certificate.layers)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.25}[dtype]
    torch.testing.assert_close(run(model, x), before, rtol=tolerance, atol=tolerance)


@settings(max_examples=80, deadline=None)
@given(LAYERS, RANKS, st.sampled_from(DTYPES))
def test_detaching_is_the_identity_on_modules_keys_and_bits(case: Any, r: int, dtype: torch.dtype):
    layer, x, targets = case
    model = Holder(layer).to(dtype).eval()
    x = x.to(dtype) if x.is_floating_point() else x
    modules, state = list(model.modules()), {k: t.clone() for k, t in model.state_dict().items()}
    y = run(model, x)
    bias = "all" if any("bias" in name for name in state) else "none"
    rw.attach(model, rw.LoRA(r=r, target_modules=targets, head="freeze", bias=bias))
    assert any(isinstance(m, LoRALayer) for m in model.modules())
    rw.detach(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert torch.equal(run(model, x), y)


@settings(max_examples=60, deadline=None)
@given(LAYERS, RANKS, st.booleans())
def test_gradients_are_those_of_finite_differences(case: Any, r: int, rslora: bool):
    model, x = adapted(case, r, torch.float64, rank_stabilized=rslora)
    trained = [p for p in model.parameters() if p.requires_grad]
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def function(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, tuple(trained), fast_mode=True)


@settings(max_examples=60, deadline=None)
@given(LAYERS, RANKS, st.sampled_from(DTYPES), st.booleans())
def test_loading_what_was_saved_is_the_identity_on_tensors(
    case: Any, r: int, dtype: torch.dtype, dora: bool
):
    model, x = adapted(case, r, dtype, dora=dora)
    before = run(model, x)
    adapter = rw.adapter_of(model)
    with tempfile.TemporaryDirectory() as folder:
        rw.save_adapter(model, Path(folder) / "adapter")
        rw.detach(model)
        rw.load_adapter(model, Path(folder) / "adapter")
    again = rw.adapter_of(model)
    assert list(again.factors) == list(adapter.factors)
    for name, factors in adapter.factors.items():
        assert torch.equal(again.factors[name].A, factors.A)
        assert torch.equal(again.factors[name].B, factors.B)
        assert again.factors[name].scale == pytest.approx(factors.scale, rel=1e-12)
    assert all(torch.equal(again.magnitudes[n], m) for n, m in adapter.magnitudes.items())
    assert torch.equal(run(model, x), before)
