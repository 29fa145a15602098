"""A layer as a matrix that is applied to rows: its inputs, its output gradients, its gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from rankwise.inits.place import Place

__all__ = ["input_rows", "unwatchable", "weight_gradient"]


def unwatchable(place: Place) -> str | None:
    """Why what reaches this weight cannot be seen from its module's inputs, or None when it can."""
    module = place.module
    if place.bank is not None:
        return "it is one of a bank of weights among which its module shares out the rows"
    kind = type(module)
    conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    if conv1d or isinstance(module, (nn.Linear, nn.Embedding)):
        return None
    if isinstance(module, _ConvNd) and not module.transposed:
        return None
    return f"{kind.__name__} reads its weights itself, so what they are applied to is not seen"


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The rows that W (out, in) is applied to: (1, N, in), or (groups, N, in) for a convolution.

    Shapes: x (..., in) of a linear layer; (N, channels, ...) or (channels, ...) of a convolution,
    whose rows are the patches under the kernel, in = channels / groups · ∏ kernel.
    """
    if isinstance(module, _ConvNd):
        return _patches(module, x)
    return x.reshape(1, -1, x.shape[-1])


def weight_gradient(module: nn.Module, x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """∂L/∂W (out, in) from a layer's input x and the gradient g of its output: Σ g xᵀ.

    The sum is taken in ``dtype``. For an embedding x are ids, and the row of ``padding_idx`` is
    left out. docs/math.md (6), (15).
    """
    g = g.to(dtype)
    if isinstance(module, nn.Embedding):
        rows = g.reshape(-1, g.shape[-1])
        ids = x.reshape(-1)
        if module.padding_idx is not None:
            rows = rows * (ids != module.padding_idx)[:, None]
        summed = torch.zeros(module.num_embeddings, rows.shape[1], dtype=dtype, device=g.device)
        return summed.index_add_(0, ids, rows).mT
    rows = input_rows(module, x).to(dtype)
    if isinstance(module, _ConvNd):
        g = g[None] if g.ndim == len(module.kernel_size) + 1 else g
        g = g.flatten(2).unflatten(1, (module.groups, -1))  # (N, groups, out / groups, places)
        g = g.permute(1, 2, 0, 3).flatten(2)
    else:
        g = g.reshape(1, -1, g.shape[-1]).mT
    return (g @ rows).flatten(0, 1)


def _patches(conv: _ConvNd, x: Tensor) -> Tensor:
    """(groups, N · places, in): what lies under the kernel at each place of the output."""
    sizes = conv.kernel_size
    x = x[None] if x.ndim == len(sizes) + 1 else x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    sides = conv._reversed_padding_repeated_twice  # pyright: ignore[reportPrivateUsage]
    x = F.pad(x, sides, mode=mode)
    for axis, (size, step, gap) in enumerate(
        zip(sizes, conv.stride, conv.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    x = x.unflatten(1, (conv.groups, -1))  # (N, groups, channels / groups, *places, *kernel)
    places = range(3, 3 + len(sizes))
    kernel = range(3 + len(sizes), 3 + 2 * len(sizes))
    x = x.permute(1, 0, *places, 2, *kernel)
    return x.flatten(2 + len(sizes)).flatten(1, 1 + len(sizes))
