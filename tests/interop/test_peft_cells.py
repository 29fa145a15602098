"""Every kind of layer that PEFT adapts as well: the same weights, outputs and gradients.

Both are given the same factors; the relative errors (Frobenius) of outputs, of the gradient of the
input and of all gradients of what trains are below 1e-13 in float64 and 2e-6 in float32, that is
some hundred or some ten roundings.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.attaching import updates_of
from rankwise.errors import UserError
from rankwise.kernels.dropout import draw, gain, new_seed
from twins import (
    ALPHA,
    One,
    backward,
    compare,
    gradient_errors,
    relative,
    twins,
    with_rankwise,
)
from zoo import Experts

pytest.importorskip("peft")

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])


@dataclass(frozen=True)
class Cell:
    """A layer, its input, and the options by which each of the two adapts it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ours: dict[str, Any] = field(default_factory=dict[str, Any])
    theirs: dict[str, Any] = field(default_factory=dict[str, Any])


ATTENTION = ["layer.q_proj", "layer.k_proj", "layer.v_proj", "layer.out_proj"]
BANKS = ["layer.up_proj", "layer.down_proj"]


def parameters(*names: str) -> dict[str, Any]:
    return {"target_modules": [], "target_parameters": list(names)}


WRAPPED = {
    "linear": Cell(lambda: nn.Linear(12, 9), (3, 7, 12)),
    "linear without bias": Cell(lambda: nn.Linear(12, 9, bias=False), (5, 12)),
    "conv1D of transformers": Cell(lambda: Conv1D(9, 12), (3, 7, 12)),
    "embedding": Cell(lambda: nn.Embedding(9, 12, padding_idx=0), ()),
    "conv1d": Cell(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": Cell(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), (2, 4, 9, 8)),
    "conv2d of size 1": Cell(lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "conv3d": Cell(lambda: nn.Conv3d(2, 6, 2, padding=1), (2, 2, 5, 4, 3)),
}
READ = {
    "banks": Cell(Experts, (3, 5, 16), {"target_modules": BANKS}, parameters(*BANKS)),
    "banks stored (in, out)": Cell(
        lambda: Experts(turned=True), (3, 5, 16), {"target_modules": BANKS}, parameters(*BANKS)
    ),
    "bare 2-D parameter": Cell(
        Experts, (3, 5, 16), {"target_modules": ["layer.scale"]}, parameters("layer.scale")
    ),
}


def inputs(cell: Cell, dtype: torch.dtype) -> Tensor:
    if not cell.shape:
        return torch.randint(0, 9, (3, 7))
    return torch.randn(cell.shape, dtype=dtype, requires_grad=True)


# --- layers --------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [*WRAPPED, *READ])
def test_a_plain_update(kind: str, training: bool, dtype: torch.dtype):
    cell = (WRAPPED | READ)[kind]
    base = One(cell.make()).to(dtype).train(training)
    ours, theirs = twins(base, cell.ours, cell.theirs)
    compare(ours, theirs, inputs(cell, dtype), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("kind", list(WRAPPED))
def test_a_rank_stabilised_magnitude_and_direction(kind: str, dtype: torch.dtype):
    cell = WRAPPED[kind]
    base = One(cell.make()).to(dtype)
    ours, theirs = twins(
        base, {"dora": True, "rank_stabilized": True}, {"use_dora": True, "use_rslora": True}
    )
    compare(ours, theirs, inputs(cell, dtype), TOLERANCE[dtype])


class DrawnBySeed(nn.Module):
    """Dropout as a low-rank branch draws it, to stand in the place of PEFT's."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        mask = draw(rows.shape, x.device, self.dropout, new_seed(x.device))
        return (rows * mask * gain(self.dropout)).view_as(x)


@pytest.mark.parametrize("kind", ["linear", "conv1D of transformers", "conv2d"])
def test_dropout_acts_where_peft_has_it_and_rests_in_evaluation(kind: str):
    cell = WRAPPED[kind]
    base = One(cell.make()).double()
    ours, theirs = twins(base, {"dropout": 0.3}, {"lora_dropout": 0.3})
    compare(ours.eval(), theirs.eval(), inputs(cell, torch.float64), 1e-13)
    ours.train()
    theirs.train()
    if kind != "conv2d":  # whose mask is torch's own, as PEFT's
        places = [m for m in theirs.modules() if isinstance(m, nn.Dropout)]
        assert [m.p for m in places] == [0.3]
        theirs.layer.lora_dropout["default"] = DrawnBySeed(0.3)
    compare(ours, theirs, inputs(cell, torch.float64), 1e-13)


def test_magnitudes_with_dropout_are_the_same_in_evaluation_and_on_average_in_training():
    """In training PEFT, as DoRA's own code, drops inputs of (g − 1) W0 x too; the mean is one."""
    base = One(nn.Linear(12, 9)).double()
    ours, theirs = twins(
        base, {"dora": True, "dropout": 0.4}, {"use_dora": True, "lora_dropout": 0.4}
    )
    x = torch.randn(1, 12, dtype=torch.float64)
    many = x.expand(40_000, 12)
    with torch.no_grad():
        means, spreads = [], []
        for model in (ours, theirs):
            y = model(many)
            means.append(y.mean(0))
            spreads.append(y.std(0))
        ours.eval()
        theirs.eval()
        exact = ours(x)
    assert relative(theirs(x), exact) < 1e-13
    for mean, spread in zip(means, spreads, strict=True):
        assert ((mean - exact[0]).abs() < 5 * spread / 200).all()  # five standard errors


# --- quantised bases -----------------------------------------------------------------------------


def four_bits() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    base = One(layer.requires_grad_(False).to("cpu"))
    base.is_loaded_in_4bit = True  # as transformers marks it for PEFT
    return base


def eight_bits() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    base = One(layer.requires_grad_(False).to("cpu"))
    base.is_loaded_in_8bit = True
    return base


def torchao_eight_bits() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    base = One(nn.Linear(64, 32))
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    return base


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("make", [four_bits, eight_bits, torchao_eight_bits])
def test_on_a_quantised_base(make: Callable[[], nn.Module], dora: bool):
    base = make()
    if dora and make is eight_bits:
        with pytest.raises(UserError, match="rounds its inputs to 8 bits"):
            with_rankwise(base, dora=True)
        return
    ours, theirs = twins(base, {"dora": dora}, {"use_dora": dora})
    compare(ours, theirs, torch.randn(3, 7, 64, requires_grad=True), TOLERANCE[torch.float32])


# --- attention, where PEFT's own numbers disagree with each other --------------------------------


def attention() -> tuple[One, Tensor]:
    base = One(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    return base, torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)


def dense(ours: nn.Module, plain: nn.Module, times: int) -> nn.Module:
    """Plain attention with the parts' updates in it, that of out_proj so many times."""
    updates = updates_of(ours)
    with torch.no_grad():
        parts = [updates[f"layer.{n}_proj"].dense(ours.layer) for n in "qkv"]
        plain.layer.in_proj_weight.add_(torch.cat(parts))
        out = updates["layer.out_proj"].dense(ours.layer.out_proj)
        plain.layer.out_proj.weight.add_(out, alpha=times)
    return plain


@pytest.mark.parametrize("grad", [True, False], ids=["slow path", "fast path"])
def test_attention_adds_the_update_of_out_proj_once_here_and_twice_there(grad: bool):
    base, x = attention()
    once, twice = copy.deepcopy(base).eval(), copy.deepcopy(base).eval()
    ours, theirs = twins(base.eval(), {"target_modules": ATTENTION}, {})
    with torch.set_grad_enabled(grad):
        y, expected = ours(x), dense(ours, once, 1)(x)
        assert relative(y, expected) < 1e-13
        assert relative(theirs(x), expected) > 0.01
        assert relative(theirs(x), dense(ours, twice, 2)(x)) < 1e-13


def test_attention_has_the_same_outputs_and_gradients_but_for_out_proj():
    """With α doubled for out_proj here the outputs agree. PEFT's gradient of out_proj is then half
    of the true one, the slope of its own outputs.
    """
    base, x = attention()
    doubled = {"target_modules": ATTENTION, "alpha_pattern": {"out_proj": 2 * ALPHA}}
    ours, theirs = twins(base, doubled, {})
    (expected, expected_dx), (y, dx) = backward(theirs, x), backward(ours, x)
    assert relative(y, expected) < 1e-13
    assert relative(dx, expected_dx) < 1e-13
    *attended, out_A, out_B = gradient_errors(theirs, ours)
    assert max(attended) < 1e-13
    assert (out_A, out_B) == pytest.approx((1, 1))
    B = theirs.get_parameter("base_model.model.layer.base_layer.out_proj.lora_B.default.weight")
    stated = B.grad[0, 0].item()
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            B[0, 0] += step
        y, _ = backward(theirs, x)
        v = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(y)
        losses.append((y * v).sum().item())
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(2 * stated, rel=1e-6)
