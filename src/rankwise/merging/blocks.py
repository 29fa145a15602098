"""W' = W0 + Σ s B A a block of rows at a time: summed where the cache holds it, rounded once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.layers import Change, LoRALayer, LowRank, wide_dtype
from rankwise.lowrank import Factors

__all__ = ["BLOCK", "RUN", "Runs", "Spares", "Sum", "held", "products", "sum_of", "widened"]

BLOCK = 2**19  # numbers in a block: in float32 they fit a processor's cache, and few calls do
RUN = 64
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

    def whole(self, size: int = BLOCK) -> Tensor:
        """All of W', in new memory."""
        return self.through(torch.empty_like(self.stored), size=size)

    def through(
        self, weight: Tensor, runs: Runs | None = None, *, write: bool = True, size: int = BLOCK
    ) -> Tensor:
        """Block by block, write W' into a tensor, unless it is there, and take the sums of it."""
        rows, columns = self.stored.shape
        size = size if self.stored.device.type == "cpu" else max(size, _LAUNCH)
        step = max(1, size // max(columns, 1))
        buffer = self.left.new_empty(min(step, rows), columns)
        blocks = zip(*(t.split(step) for t in (self.stored, self.left, weight)), strict=True)
        sums = repeat(None) if runs is None else runs.split(step)
        for (base, left, there), seen in zip(blocks, sums, strict=False):
            wide = widened(base, buffer)
            if seen is not None:
                seen.before(wide)
            if write:
                self.put(there, wide, left)
            if seen is not None:
                seen.after(widened(there, buffer))
        return weight

    def put(self, there: Tensor, wide: Tensor, left: Tensor) -> None:
        """A block of W' from one of W0, which is overwritten where W' is shorter, and one of L."""
        if wide.dtype == there.dtype:
            torch.mm(left, self.right, out=there).add_(wide)
        else:
            there.copy_(wide.addmm_(left, self.right))

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
            float(f.square().sum(d).max().sqrt()) for f, d in ((self.left, 1), (self.right, 0))
        )
        largest = float(torch.maximum(-low, high)) + rows * columns
        return largest < 0.99 * torch.finfo(self.stored.dtype).max

    def norm(self) -> float:
        """‖δ‖ (Frobenius), from the (k, k) products of the factors in float64."""
        left, right = self.left.cpu().double(), self.right.cpu().double()  # mps has no float64
        return float(((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0).sqrt())


@dataclass(frozen=True)
class Runs:
    """Every row of W0 and of W' cut into runs of 64 numbers, each of which is summed with signs v.

    Attributes:
        signs: v (64,), drawn once.
        base: W0 v, (rows, runs of a row); so are the others.
        merged: W' v.
        size: ‖W'‖₂ of each run.
    """

    signs: Tensor
    base: Tensor
    merged: Tensor
    size: Tensor

    @classmethod
    def of(cls, total: Sum) -> Runs:
        """Room for those of a weight."""
        rows, columns = total.stored.shape
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (RUN,), generator=generator) * 2 - 1
        return cls(signs.to(total.left), *total.left.new_empty(3, rows, -(-columns // RUN)))

    def split(self, rows: int) -> Iterator[Runs]:
        """Those of so many rows at a time."""
        parts = (t.split(rows) for t in (self.base, self.merged, self.size))
        return (Runs(self.signs, *part) for part in zip(*parts, strict=True))

    def before(self, base: Tensor) -> None:
        """Take the sums of these rows of W0."""
        torch.mv(cut_in_runs(base), self.signs, out=self.base.view(-1))

    def after(self, merged: Tensor) -> None:
        """Take the sums and the norms of these rows of W'."""
        runs = cut_in_runs(merged)
        torch.mv(runs, self.signs, out=self.merged.view(-1))
        torch.linalg.vector_norm(runs, dim=1, out=self.size.view(-1))


class Spares:
    """The memory of weights that were given up, for the next W' of the size: new memory is slow.

    At most one for each size is held, and none that no W' to come will want.

    Attributes:
        held: by dtype and number of elements.
    """

    def __init__(self, wanted: Iterable[Tensor] = ()) -> None:
        self._wanted = Counter(map(_kind, wanted))
        self.held: dict[tuple[torch.dtype, int], Tensor] = {}

    def take(self, stored: Tensor) -> Tensor:
        """A tensor like this W0, for its W'; its numbers are anything."""
        self._wanted[_kind(stored)] -= 1
        found = self.held.pop(_kind(stored), None)
        fits = found is not None and found.device == stored.device and stored.is_contiguous()
        return found.view(stored.shape) if found is not None and fits else torch.empty_like(stored)

    def give(self, alias: Tensor) -> None:
        """Hold what an alias of a given-up weight shows, if it is wanted and nobody else has it."""
        if self._wanted[_kind(alias)] > 0 and _alone(alias):
            self.held[_kind(alias)] = alias


def _kind(weight: Tensor) -> tuple[torch.dtype, int]:
    return weight.dtype, weight.numel()


def _alone(alias: Tensor) -> bool:
    """Whether this tensor is the last way to its memory, which is the program's own and all of it.

    Views, arrays, storages and graphs that look at the memory are counted. Memory that a file or
    another process may see, and such as came from elsewhere, is never this tensor's alone.
    """
    if not alias.is_cpu or _holders(alias) != _holders(torch.empty(1)):
        return False
    storage = alias.untyped_storage()
    whole = alias.is_contiguous() and storage.nbytes() == alias.nbytes
    return whole and storage.resizable() and not alias.is_shared() and not alias.is_inference()


def _holders(tensor: Tensor) -> tuple[int, int]:
    """How often a tensor's storage is held in Python and in C++."""
    storage = tensor.untyped_storage()
    inner = torch._C._storage_Use_Count(storage._cdata)  # pyright: ignore[reportPrivateUsage]
    return sys.getrefcount(storage), inner


def widened(part: Tensor, buffer: Tensor) -> Tensor:
    """Some rows in the buffer's dtype: in the buffer, unless they are stored so."""
    return part if part.dtype == buffer.dtype else buffer[: part.shape[0]].copy_(part)


def cut_in_runs(numbers: Tensor) -> Tensor:
    """Rows cut into runs, (rows · runs, 64); the last run of each is filled up with zeros."""
    missing = -numbers.shape[-1] % RUN
    return (F.pad(numbers, (0, missing)) if missing else numbers).reshape(-1, RUN)


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
