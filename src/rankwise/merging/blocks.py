"""W' = W0 + Σ s B A a block of rows at a time: summed where the cache holds it, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.layers import Change, LoRALayer, LowRank, wide_dtype
from rankwise.lowrank import Factors

__all__ = ["BLOCK", "Sum", "held", "products", "sum_of", "widened"]

BLOCK = 2**19  # numbers in a block: in float32 they fit a processor's cache, and few calls do
_LAUNCH = 2**24  # elsewhere than on a CPU, where starting a kernel costs more than a cache miss


@dataclass(frozen=True)
class Sum:
    """W' = W0 + L R, in the layout in which W0 (rows, columns) is stored.

    Attributes:
        stored: W0, in the dtype that W' is rounded to.
        left: L (rows, k) in float32 (float64 beside float64): s B of all updates side by side, or
            s Aᵀ where the weight is stored as (in, out).
        right: R (k, columns), A of all updates one below the other, or Bᵀ.
    """

    stored: Tensor
    left: Tensor
    right: Tensor

    def blocks(self, size: int = BLOCK) -> Iterator[slice]:
        """The rows block by block, each of at most so many numbers, or of one row."""
        rows, columns = self.stored.shape
        size = size if self.stored.device.type == "cpu" else max(size, _LAUNCH)
        step = max(1, size // max(columns, 1))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def buffer(self, size: int = BLOCK) -> Tensor:
        """Room for one block in the wide dtype."""
        rows = next(self.blocks(size), slice(0, 0)).stop
        return self.left.new_empty(rows, self.stored.shape[1])

    def whole(self, size: int = BLOCK) -> Tensor:
        """All of W'."""
        result = torch.empty_like(self.stored)
        buffer = self.buffer(size)
        for rows in self.blocks(size):
            target, wide = result[rows], widened(self.stored[rows], buffer)
            if wide.dtype == target.dtype:
                torch.mm(self.left[rows], self.right, out=target).add_(wide)
            else:
                target.copy_(wide.addmm_(self.left[rows], self.right))
        return result

    def at(self, places: Tensor, axis: int) -> Sum:
        """Some of its rows (axis 0) or columns (axis 1)."""
        left, right = self.left, self.right
        left, right = (left, right[:, places]) if axis else (left[places], right)
        return Sum(self.stored.index_select(axis, places), left, right)

    def surely_finite(self) -> bool:
        """Whether W' cannot but be finite: max |W0| + max ‖L_i‖ max ‖R_j‖ is in the dtype's range.

        One pass over W0, where W' itself would have to be computed.
        """
        low, high = torch.aminmax(self.stored)
        rows, columns = (
            float(torch.linalg.vector_norm(f, dim=d).max())
            for f, d in ((self.left, 1), (self.right, 0))
        )
        largest = float(torch.maximum(-low, high)) + rows * columns
        return largest < 0.99 * torch.finfo(self.stored.dtype).max

    def norm(self) -> float:
        """‖δ‖ (Frobenius), from the (k, k) products of the factors in float64."""
        left, right = self.left.cpu().double(), self.right.cpu().double()  # mps has no float64
        return float(((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0).sqrt())


def widened(part: Tensor, buffer: Tensor) -> Tensor:
    """Some rows in the buffer's dtype: in the buffer, unless they are stored so."""
    return part if part.dtype == buffer.dtype else buffer[: part.shape[0]].copy_(part)


def sum_of(layer: LoRALayer, parameter: str, stored: Tensor) -> Sum | None:
    """W' of a matrix of which every change is a product over all rows; None of any other."""
    changes = layer.changes(parameter)
    pairs = products(changes)
    if not pairs or stored.ndim != 2:
        return None
    wide = wide_dtype(stored)
    A = torch.cat([f.A.detach().to(wide) for f in pairs])
    B = torch.cat([f.B.detach().to(wide) * f.scale for f in pairs], 1)
    left, right = (A.mT, B.mT) if changes[0].layout.transposed else (B, A)
    return Sum(stored, left.contiguous(), right.contiguous())


def products(changes: Sequence[Change]) -> list[Factors]:
    """A and B of each change; empty when one is more than a product over all rows."""
    plain = [
        u for u in changes if isinstance(u, LowRank) and u.magnitude is None and not u.layout.rows
    ]
    return [u.factors().conditioned() for u in plain] if len(plain) == len(changes) else []


def held(module: nn.Module, parameter: str) -> Tensor | None:
    """A parameter of a merged layer; None where W' is computed whenever it is read."""
    computed = isinstance(vars(type(module)).get(parameter), property)
    return None if computed else getattr(module, parameter)
