"""A frozen linear layer whose weight is packed once for the CPU's fastest kernels, W and Wᵀ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.kernels.linear import can_fuse
from rankwise.kernels.plain import PlainLinear

__all__ = ["PackedLinear", "can_pack"]


def can_pack(weight: Tensor) -> bool:
    """Whether torch and this processor can pack a weight like this one.

    It is float32, or bfloat16 on a processor with instructions for it, and on a CPU. One that was
    made in torch's inference mode is not: nothing tells there when it is written.
    """
    if not torch.backends.mkldnn.is_available() or weight.device.type != "cpu":
        return False
    if weight.is_inference():
        return False
    half = weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (half or weight.dtype is torch.float32) and weight.ndim == 2 and weight.numel() > 0


class PackedLinear:
    """y = x Wᵀ + b and dx = dy W by oneDNN's kernels for constant weights.

    oneDNN reorders a weight at every call of an ordinary product. A frozen weight needs that only
    once, here, at the first call: for W and for Wᵀ, which costs their bytes twice more. Sums are
    made in another order than in the plain product, so that the result differs by a few roundings.

    The weight stays where it is, plain, in its module. When it has been written or replaced since,
    it or the bias trains, or it is on another device or in another dtype, the plain products are
    computed; so they are under autocast, in torch.func and while torch.compile traces. A copy of a
    model packs anew. A write into ``weight.data`` goes unseen, as it does by autograd.

    Args:
        module: holds ``weight`` (out, in), frozen, and ``bias`` (out,) or None; it is an nn.Linear
            unless ``turned``, which says that the weight is stored as (in, out).
        rows: about how many rows x will have; oneDNN picks the layout by it.
    """

    def __init__(self, module: nn.Module, rows: int, turned: bool = False) -> None:
        self.module = module
        self.rows = rows
        self.turned = turned
        self._packs: tuple[tuple[object, ...], Tensor, Tensor, Tensor] | None = None

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, used by keyword
        """The layer by itself, without updates: what stands for the ``forward`` of its module."""
        plain = self.plain
        if not can_fuse(input, plain.weight) or self._current() is None:
            return plain.forward(input)
        if not (torch.is_grad_enabled() and input.requires_grad):
            return self.forward(input)
        return _Alone.apply(input, self)

    @property
    def plain(self) -> PlainLinear:
        """The layer as it is stored."""
        weight, bias = (vars(self.module)["_parameters"].get(n) for n in ("weight", "bias"))
        assert weight is not None
        return PlainLinear(weight.T if self.turned else weight, bias)

    @property
    def nbytes(self) -> int:
        """Bytes that packing costs beside the weight."""
        return 2 * self.plain.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b for x (..., in)."""
        packs = self._current()
        plain = self.plain
        return plain.forward(x) if packs is None else _product(x, packs[0], plain.bias)

    def backward(self, dy: Tensor) -> Tensor:
        """dy W for dy (rows, out)."""
        packs = self._current()
        if packs is None or (torch.is_grad_enabled() and dy.requires_grad):
            return self.plain.backward(dy)
        return _product(dy, packs[1], None)

    def saved(self) -> Tensor:
        """W itself."""
        return self.plain.weight

    def _current(self) -> tuple[Tensor, Tensor] | None:
        """The packed W and Wᵀ; None where the weight is no longer the one that was packed."""
        weight, bias = (vars(self.module)["_parameters"].get(n) for n in ("weight", "bias"))
        if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        state = (id(weight), weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._packs is None:
            stored = weight.detach()
            matrix = stored.T if self.turned else stored
            packs = (_reorder(matrix, self.rows), _reorder(matrix.T, self.rows))
            self._packs = (state, *packs, stored)  # held, so that its address is not used again
        return self._packs[1:3] if self._packs[0] == state else None

    def __reduce__(self) -> tuple[object, ...]:
        return PackedLinear, (self.module, self.rows, self.turned)


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedLinear) -> Tensor:
        ctx.packed = packed
        ctx.save_for_backward(packed.saved())
        return packed.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # reading it checks that it was not written since
        (dy,) = grads
        dx = ctx.packed.backward(dy.reshape(-1, dy.shape[-1]))
        return dx.view(*dy.shape[:-1], dx.shape[-1]), None


def _reorder(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
