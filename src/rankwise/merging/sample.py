"""The check of a large weight: some rows number by number, and all of it by sums over short runs.

Every row of a stored weight is cut into runs of 64 numbers, and each run is summed up with signs v
that are drawn once. An honest W' has W' v = W0 v + L (R v) with δ = L R, up to its roundings
(docs/math.md (7d)). One pass over the weight so finds a wrong block wherever it is, for the price
of a matrix-vector product where comparing number by number would multiply out δ once more. It
sees a fault in a single number only from some part of the run's own size on: hence the sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.layers import LoRALayer
from rankwise.merging.blocks import Sum, held, products, sum_of, widened
from rankwise.merging.slabs import Slab, cut, reference
from rankwise.merging.units import gamma, roundoff, smallest

__all__ = ["LARGE", "Sample", "sampled", "settle"]

LARGE = 2**18  # numbers; a weight of no more is compared number by number
ROWS = 8  # compared number by number of a large one, beside the ids that a probe looks up
RUN = 64


@dataclass(frozen=True)
class Sample:
    """What was looked at of a large weight.

    Attributes:
        places: the sampled rows of W (out, in): evenly spread, the first and the last among them.
            Of an embedding the sampled ids.
        of: how many rows, or ids, there are.
        slab: W0, its updates and W' there.
        sums: the largest |Σ ± (W' - (W0 + δ))| / bound of all runs; 0 while W' is computed when
            it is read, see :func:`settle`.
        update: ‖δ‖ of the whole weight.
    """

    places: Tensor
    of: int
    slab: Slab
    sums: float
    update: float


def sampled(layer: LoRALayer, parameter: str, merged: nn.Module, x: Tensor | None) -> Sample | None:
    """The sample of a large weight; None of another, which is compared number by number.

    So is a large one that is more than a sum of products, or that may not be finite.
    """
    total = _large(layer, parameter)
    if total is None:
        return None
    turned = layer.changes(parameter)[0].layout.transposed
    axis = int(turned != layer.lookup)  # along which a row of W, or an id, lies in storage
    of = total.stored.shape[axis]
    spread = torch.linspace(0, of - 1, min(ROWS, of)).long().tolist()
    seen = x.flatten().tolist() if layer.lookup and x is not None else []
    places = torch.tensor(sorted({*spread, *seen}), device=total.stored.device)
    found = held(merged, parameter)
    if found is None:
        sums, finite = 0.0, total.surely_finite()
        there = total.at(places, axis).whole()
    else:
        sums = _sums(layer, parameter, total, found)
        finite = math.isfinite(sums)
        there = found.index_select(axis, places)
    if not finite:
        return None
    slab = cut(layer, parameter, places, there.mT if turned else there)
    return Sample(places, of, slab, sums, total.norm())


def settle(layer: LoRALayer, parameter: str, twin: nn.Module) -> float | None:
    """The sums of a large W' once it is written, before its W0 is given up; None of another.

    Should they not hold, W' is computed anew in float64, as the reference that it is checked
    against: what a certificate has passed is then still what the model gets.
    """
    total = _large(layer, parameter)
    if total is None:
        return None
    sums = _sums(layer, parameter, total, twin.get_parameter(parameter))
    if not sums <= 1:
        again = nn.Parameter(reference(layer, parameter), requires_grad=False)
        twin.register_parameter(parameter, again)
        sums = _sums(layer, parameter, total, again)
    return sums


def _large(layer: LoRALayer, parameter: str) -> Sum | None:
    shape = layer.changes(parameter)[0].layout.shape
    if len(shape) < 2 or math.prod(shape) <= LARGE:
        return None
    return sum_of(layer, parameter, layer.base_weight(parameter))


def _sums(layer: LoRALayer, parameter: str, total: Sum, merged: Tensor) -> float:
    """The largest |W' v - W0 v - L (R v)| / bound of all runs; NaN or infinite where W' is."""
    dtype, count = merged.dtype, merged.shape[0]
    signs, buffer = _signs(total.left), total.buffer()
    room = -(-merged.shape[1] // RUN)
    before, after, size = (total.left.new_empty(count * room) for _ in range(3))
    for rows in total.blocks():
        place = slice(rows.start * room, rows.stop * room)
        torch.mv(_runs(widened(total.stored[rows], buffer)), signs, out=before[place])
        runs = _runs(widened(merged[rows], buffer))
        torch.mv(runs, signs, out=after[place])
        torch.linalg.vector_norm(runs, dim=1, out=size[place])
    delta, terms, roundings = _updates(layer, parameter, signs)
    carried = 4 * gamma(RUN + roundings + 4, roundoff(buffer.dtype))
    rounded = 1.02 * roundoff(dtype) if dtype != buffer.dtype else 0.0
    bound = size.mul_(math.sqrt(RUN) * (rounded + carried)).add_(terms, alpha=carried)
    apart = after.sub_(before).sub_(delta).abs_()
    return float(apart.div_(bound.add_(RUN * smallest(dtype))).max())


def _updates(layer: LoRALayer, parameter: str, signs: Tensor) -> tuple[Tensor, Tensor, int]:
    """δ v by run, what its terms add up to without their signs, and the roundings in δ."""
    changes = layer.changes(parameter)
    turned = changes[0].layout.transposed
    values, sizes, roundings = signs.new_zeros(()), signs.new_zeros(()), 0
    for pair in products(changes):
        left, right = (pair.A.mT, pair.B.mT) if turned else (pair.B, pair.A)
        left, right = (f.detach().to(signs.dtype) for f in (left * pair.scale, right))
        runs = _runs(right).view(len(right), -1, RUN)
        values = values + left @ (runs @ signs)
        sizes = sizes + left.abs() @ runs.abs().sum(-1)
        roundings += pair.r + 2
    return values.flatten(), sizes.flatten(), roundings


def _runs(numbers: Tensor) -> Tensor:
    """Rows cut into runs, (rows · runs, RUN); the last run of each is filled up with zeros."""
    missing = -numbers.shape[-1] % RUN
    return (F.pad(numbers, (0, missing)) if missing else numbers).reshape(-1, RUN)


def _signs(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2, (RUN,), generator=generator) * 2 - 1).to(like)
