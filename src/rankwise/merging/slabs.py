"""A weight and its updates in float64, a few rows at a time: what a merge is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.layers import Change, LoRAConv, LoRALayer, LowRank, Shared
from rankwise.merging.blocks import products

__all__ = ["BLOCK", "Slab", "cut", "reference", "slabs"]

BLOCK = 2**18  # numbers of a weight held in a wider dtype at a time; more would leave the cache


@dataclass(frozen=True)
class Slab:
    """Some rows of a parameter read as a matrix (some members of a bank), in float64.

    Attributes:
        rows: which.
        base: W0 there.
        delta: Σ δ_i there, of all live updates.
        size: the same sum with every term without its sign, |δ|_sum.
        roundings: K, the roundings on the way to an element of δ.
        through: the largest sum of a row of s |B|, which multiplies an error in A x.
        other: another tensor in the same layout there, W0 again where none was given.
        bank: whether the rows are members of a bank.
    """

    rows: slice | Tensor
    base: Tensor
    delta: Tensor
    size: Tensor
    roundings: int
    through: float
    other: Tensor
    bank: bool


def slabs(layer: LoRALayer, parameter: str, other: Tensor | None = None) -> Iterator[Slab]:
    """The parameter slab by slab; a convolution's in one piece."""
    base = layer.base_weight(parameter)
    changes = layer.changes(parameter)
    layout = changes[0].layout
    flat = base.ndim == 1
    matrix = base[:, None] if flat else layout.matrix(base)
    beside = matrix if other is None else (other[:, None] if flat else layout.matrix(other))
    per_row = matrix[0].numel()
    step = len(matrix) if isinstance(layer, LoRAConv) else max(1, BLOCK // max(per_row, 1))
    dense = {id(u): (_dense(u, layer), _sizes(u, layer)) for u in changes if not _is_plain(u)}
    for start in range(0, len(matrix), step):
        rows = slice(start, min(start + step, len(matrix)))
        mine = _wide(matrix[rows])
        delta, size = torch.zeros_like(mine), torch.zeros_like(mine)
        roundings, through = 0, 0.0
        for update in changes:
            part = _part(update, rows, mine, dense.get(id(update)))
            delta, size = delta + part.delta, size + part.size
            roundings += part.roundings
            through += part.through
        yield Slab(
            rows,
            mine,
            delta,
            size,
            roundings,
            through,
            _wide(beside[rows]),
            layout.bank and not flat,
        )


def cut(layer: LoRALayer, parameter: str, places: Tensor, other: Tensor) -> Slab:
    """Some rows of a matrix of which every update is a product; of an embedding some ids.

    ``other`` is in the same layout, and of these places only.
    """
    base = layer.changes(parameter)[0].layout.matrix(layer.base_weight(parameter))
    base = _wide(base[:, places] if layer.lookup else base[places])
    delta, size = torch.zeros_like(base), torch.zeros_like(base)
    roundings, through = 0, 0.0
    for pair in products(layer.changes(parameter)):
        A, B = (pair.A[:, places], pair.B) if layer.lookup else (pair.A, pair.B[places])
        A, B = _wide(A), _wide(B) * pair.scale
        delta, size = delta + B @ A, size + B.abs() @ A.abs()
        roundings += pair.r + 2
        through += float(B.abs().sum(-1).max())
    return Slab(places, base, delta, size, roundings, through, _wide(other), bank=False)


def reference(layer: LoRALayer, parameter: str) -> Tensor:
    """W' = W0 + Σ δ, summed in float64 and rounded once, laid out as W0 is."""
    result = torch.empty_like(layer.base_weight(parameter))
    matrix = layer.changes(parameter)[0].layout.matrix(result)
    for slab in slabs(layer, parameter):
        matrix[slab.rows] = (slab.base + slab.delta).to(matrix)
    return result


@dataclass(frozen=True)
class _Part:
    delta: Tensor
    size: Tensor
    roundings: int
    through: float


def _is_plain(update: Change) -> bool:
    """Whether any rows of δ can be had without the others."""
    return isinstance(update, LowRank) and update.layout.rows is None


def _part(update: Change, rows: slice, base: Tensor, dense: tuple[Tensor, Tensor] | None) -> _Part:
    if dense is not None:
        there, size = (part[rows] for part in dense)
        inner = update.source if isinstance(update, Shared) else update
        r = inner.factors().pair().r if isinstance(inner, LowRank) else 0
        reach = base.shape[-1] if isinstance(inner, LowRank) and inner.magnitude is not None else 0
        return _Part(there, size, r + reach + 8, float(there.abs().sum(-1).max()))
    assert isinstance(update, LowRank)
    pair = update.factors().conditioned()
    A, B = _wide(pair.A), _wide(pair.B)
    A, B = (A[rows], B[rows]) if update.layout.bank else (A, B[rows])
    delta = (B * pair.scale) @ A
    size = (B.abs() * pair.scale) @ A.abs()
    through = float((B.abs() * pair.scale).sum(-1).max())
    if update.magnitude is None:
        return _Part(delta, size, pair.r + 2, through)
    m = _wide(update.magnitude)[rows][..., None]
    gain = m / torch.linalg.vector_norm(base + delta, dim=-1, keepdim=True).clamp_min(1e-300)
    whole = gain.abs() * (base.abs() + size) + base.abs()
    roundings = pair.r + base.shape[-1] + 8
    return _Part(
        (gain - 1) * base + gain * delta, whole, roundings, float(gain.abs().max()) * through
    )


def _dense(update: Change, layer: LoRALayer) -> Tensor:
    """δ of an update that covers some rows or columns only, spread over all rows, in float64."""
    return _spread(update, layer, _wide(update.dense(layer)))


def _sizes(update: Change, layer: LoRALayer) -> Tensor:
    """|δ|_sum of such an update."""
    inner = update.source if isinstance(update, Shared) else update
    if not isinstance(inner, LowRank):
        return _dense(update, layer).abs()
    pair = inner.factors().conditioned()
    size = (_wide(pair.B).abs() * pair.scale) @ _wide(pair.A).abs()
    if inner.magnitude is not None:
        base = _wide(
            update.layout.cut(update.layout.matrix(layer.base_weight(update.layout.parameter)))
        )
        norm = torch.linalg.vector_norm(base + _wide(pair.delta()), dim=-1, keepdim=True)
        gain = (_wide(inner.magnitude)[..., None] / norm.clamp_min(1e-300)).abs()
        size = gain * (base.abs() + size) + base.abs()
    turned = isinstance(update, Shared) and update.turned
    return _spread(update, layer, size.mT if turned else size)


def _spread(update: Change, layer: LoRALayer, part: Tensor) -> Tensor:
    if part.ndim == 1:
        return part[:, None]
    rows = update.layout.rows
    if rows is None:
        return part
    base = layer.base_weight(update.layout.parameter)
    every = part.new_zeros(len(update.layout.matrix(base)), part.shape[-1])
    return every.index_add(0, torch.tensor(rows, device=part.device), part)


def _wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has no float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
