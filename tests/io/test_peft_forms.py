"""The shapes of PEFT's updates: there and back without a change, and the same δ in between."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.io.peft_forms import A_KEY, B_KEY, Convolution, Linear, Parameter, Plain
from rankwise.layers import Layout, layout_of
from rankwise.lowrank import Factors

FORMS = {
    "linear": lambda: Linear("m", "m", {"m": Layout("weight", (6, 5))}),
    "conv1d": lambda: Linear("m", "m", {"m": Layout("weight", (5, 6), transposed=True)}),
    "embedding": lambda: Linear(
        "m", "m", {"m": Layout("weight", (5, 6), transposed=True)}, embedding=True
    ),
    "convolution": lambda: Convolution("m", "m", {"m": Layout("weight", (6, 5, 3, 2))}),
    "groups": lambda: Convolution("m", "m", {"m": Layout("weight", (6, 2, 3))}, groups=3),
    "channels": lambda: Convolution("m", "m", {"m": Layout("weight", (8, 1, 3))}, groups=4),
    "matrix": lambda: Parameter("m.w", "m", {"m.w": Layout("w", (6, 5))}),
    "bank": lambda: Parameter("m.w", "m", {"m.w": Layout("w", (4, 6, 5), bank=True)}),
    "turned bank": lambda: Parameter(
        "m.w", "m", {"m.w": Layout("w", (4, 5, 6), transposed=True, bank=True)}
    ),
    "plain": lambda: Plain("m.w", "m.w", {"m.w": Layout("w", (4, 6, 5), bank=True)}),
}


def factors(layout: Layout, r: int = 2, scale: float = 1.5) -> Factors:
    bank = () if layout.experts is None else (layout.experts,)
    A = torch.randn(*bank, r, layout.in_features)
    return Factors(A, torch.randn(*bank, layout.out_features, r), scale)


@pytest.mark.parametrize("case", FORMS)
def test_what_is_packed_comes_back_and_has_the_wanted_shapes(case: str):
    form = FORMS[case]()
    ((name, layout),) = form.places.items()
    piece = factors(layout)
    packed = form.pack({name: piece})
    wanted = form.wanted(packed.r)
    assert {k: tuple(t.shape) for k, t in packed.tensors.items()} == {
        k: w.shape for k, w in wanted.items()
    }
    for key, each in wanted.items():
        assert packed.tensors[key].shape[each.axis] == round(packed.r * each.each)
    assert form.misfit(packed.tensors) is None
    assert packed.scale == piece.scale
    A, B = form.unpack(packed.tensors, {}, {})[name]
    assert torch.equal(A, piece.A)
    assert torch.equal(B, piece.B)


def run(conv: nn.Conv2d, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """PEFT's two convolutions: A over all channels, B over the groups."""
    narrow = F.conv2d(x, tensors[A_KEY], None, conv.stride, conv.padding)
    return F.conv2d(narrow, tensors[B_KEY], None, groups=conv.groups)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_with_groups_runs_in_peft_as_its_weight_does(groups: int):
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=groups, bias=False)
    form = Convolution("m", "m", {"m": layout_of(conv)}, groups=groups)
    piece = factors(layout_of(conv), r=2)
    packed = form.pack({"m": piece})
    assert packed.r == 2 * groups
    x = torch.randn(2, 8, 5, 4)
    delta = (piece.B @ piece.A).view_as(conv.weight)
    direct = F.conv2d(x, delta, None, padding=1, groups=groups)
    torch.testing.assert_close(run(conv, dict(packed.tensors), x), direct, rtol=1e-4, atol=1e-4)


def test_an_update_of_each_group_by_itself_is_one_of_a_higher_rank():
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
    form = Convolution("m", "m", {"m": layout_of(conv)}, groups=2)
    down = torch.zeros(2, 3, 2, 4, 3, 3)  # groups of rows, rows, groups of channels, channels
    down[0, :, 0] = torch.randn(3, 4, 3, 3)
    down[1, :, 1] = torch.randn(3, 4, 3, 3)
    tensors = {A_KEY: down.view(6, 8, 3, 3), B_KEY: torch.randn(12, 3, 1, 1)}
    assert form.misfit(tensors) is None
    A, B = form.unpack(tensors, {}, {})["m"]
    assert (tuple(A.shape), tuple(B.shape)) == ((6, 36), (12, 6))
    x = torch.randn(2, 8, 5, 4)
    direct = F.conv2d(x, (B @ A).view_as(conv.weight), None, padding=1, groups=2)
    torch.testing.assert_close(run(conv, tensors, x), direct, rtol=1e-4, atol=1e-4)


def test_a_dense_update_of_groups_is_no_update_of_the_weight():
    form = FORMS["groups"]()
    tensors = {A_KEY: torch.randn(6, 6, 3), B_KEY: torch.randn(6, 2, 1)}
    assert "dense over the channels of a convolution with 3 groups" in (form.misfit(tensors) or "")


@pytest.mark.parametrize("turned", [False, True])
def test_a_bank_is_in_the_file_as_peft_reads_it(turned: bool):
    """PEFT: A.reshape(E, r, in), B.reshape(out, r, E), Δ = einsum("o r e, e r i -> e o i")."""
    shape = (4, 5, 6) if turned else (4, 6, 5)
    layout = Layout("w", shape, transposed=turned, bank=True)
    piece = factors(layout)
    tensors = Parameter("m.w", "m", {"m.w": layout}).pack({"m.w": piece}).tensors
    A = tensors[A_KEY].numpy().reshape(4, 2, 5)
    B = tensors[B_KEY].numpy().reshape(6, 2, 4)
    delta = np.einsum("ore,eri->eoi", B, A)
    np.testing.assert_allclose(delta, (piece.B @ piece.A).numpy(), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_stored_turned_swaps_its_factors():
    layout = Layout("weight", (5, 6), transposed=True)
    form = Parameter("m.weight", "m", {"m": layout}, turned=True)
    stored = {A_KEY: torch.randn(2, 6), B_KEY: torch.randn(5, 2)}
    assert {k: w.shape for k, w in form.wanted(2).items()} == {A_KEY: (2, 6), B_KEY: (5, 2)}
    A, B = form.unpack(stored, {}, {})["m"]
    torch.testing.assert_close((B @ A).T, stored[B_KEY] @ stored[A_KEY])


def test_a_magnitude_has_the_shape_of_the_outputs():
    shapes = {case: FORMS[case]().magnitude() for case in FORMS}
    assert shapes["linear"] == shapes["embedding"] == (6,)
    assert shapes["convolution"] == (1, 6, 1, 1)
    assert shapes["plain"] == (4, 6)
