"""Layers as matrices on rows: outputs and gradients against torch's own layers and autograd."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.inits import Place
from rankwise.inits.geometry import input_rows, unwatchable, weight_gradient

torch.manual_seed(0)  # tests are collected before they are seeded
CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9)),
    (nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect", bias=False), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular", groups=4, bias=False), (4, 9, 8)),
    (nn.Conv2d(4, 6, (1, 3), padding=(0, 2), padding_mode="replicate", bias=False), (2, 4, 5, 6)),
    (nn.Conv3d(2, 4, 2, padding="valid", bias=False), (2, 2, 4, 4, 5)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS, ids=str)
def test_a_convolution_is_its_matrix_on_patches(conv: nn.Module, shape: tuple[int, ...]):
    x = torch.randn(shape)
    rows = input_rows(conv, x)
    weight = conv.get_parameter("weight").detach().flatten(1)
    found = rows @ weight.view(len(rows), -1, rows.shape[-1]).mT  # (groups, N · places, out/groups)
    expected = conv(x).detach()
    if expected.ndim < len(conv.get_parameter("weight").shape):
        expected = expected[None]
    expected = expected.flatten(2).movedim(1, -1)  # (N, places, out)
    torch.testing.assert_close(found.movedim(0, 1).flatten(1), expected.flatten(0, 1))


@pytest.mark.parametrize(
    ("module", "shape"),
    [*CONVOLUTIONS, (nn.Linear(5, 7), (2, 3, 5)), (nn.Linear(5, 7), (5,)), (Conv1D(7, 5), (4, 5))],
    ids=str,
)
def test_the_weight_gradient_is_autograds(module: nn.Module, shape: tuple[int, ...]):
    x = torch.randn(shape)
    y = module(x)
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, module.get_parameter("weight"), g)
    expected = expected.T if isinstance(module, Conv1D) else expected.flatten(1)
    torch.testing.assert_close(weight_gradient(module, x, g, torch.float32), expected)


@pytest.mark.parametrize("padding", [None, 3])
def test_the_gradient_of_an_embedding_is_autograds(padding: int | None):
    table = nn.Embedding(9, 4, padding_idx=padding)
    ids = torch.tensor([[1, 3, 3], [0, 1, 8]])
    y = table(ids)
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, table.weight, g)
    torch.testing.assert_close(weight_gradient(table, ids, g, torch.float32), expected.T)


def test_sums_are_taken_in_the_dtype_asked_for():
    layer = nn.Linear(5, 7)
    x, g = torch.randn(6, 5, dtype=torch.bfloat16), torch.randn(6, 7, dtype=torch.bfloat16)
    found = weight_gradient(layer, x, g, torch.float32)
    torch.testing.assert_close(found, g.float().T @ x.float())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(2, 3), None),
        (Conv1D(3, 2), None),
        (nn.Embedding(3, 2), None),
        (nn.Conv2d(2, 3, 1), None),
        (nn.ConvTranspose2d(2, 3, 1), "reads its weights itself"),
        (nn.Bilinear(2, 2, 3), "Bilinear reads its weights itself"),
    ],
    ids=str,
)
def test_what_can_be_watched(place_of: Callable[..., Place], module: nn.Module, reason: str | None):
    found = unwatchable(place_of(module))
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


def test_attention_and_banks_cannot_be_watched(
    place_of: Callable[..., Place], bank_of: Callable[[Tensor], Place]
):
    attention = nn.MultiheadAttention(4, 2)
    place = replace(place_of(nn.Linear(4, 4)), module=attention)
    assert "MultiheadAttention reads its weights itself" in str(unwatchable(place))
    assert "shares out the rows" in str(unwatchable(bank_of(torch.zeros(2, 3, 4))))
