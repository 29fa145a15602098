"""The check of a large weight: some rows number by number, and all of it by sums over short runs.

Every row of a stored weight is cut into runs of 64 numbers, and each run is summed up with signs v
that are drawn once. An honest W' has W' v = W0 v + L (R v) with δ = L R, up to its roundings
(docs/math.md (7d)). One pass over the weight so finds a wrong block wherever it is, for the price
of a matrix-vector product where comparing number by number would multiply out δ once more. It
sees a fault in a single number only from some part of the run's own size on: hence the sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankwise.layers import LoRALayer
from rankwise.merging.blocks import (
    BLOCK,
    RUN,
    Runs,
    Spares,
    Sum,
    cut_in_runs,
    held,
    products,
    sum_of,
)
from rankwise.merging.slabs import Slab, cut, reference
from rankwise.merging.units import gamma, roundoff, smallest

__all__ = ["LARGE", "Sample", "Writing", "sampled"]

LARGE = 2**18  # numbers; a weight of no more is compared number by number
ROWS = 8  # compared number by number of a large one, beside the ids that a probe looks up


@dataclass(frozen=True)
class Sample:
    """What was looked at of a large weight.

    Attributes:
        places: the sampled rows of W (out, in): evenly spread, the first and the last among them.
            Of an embedding the sampled ids.
        of: how many rows, or ids, there are.
        slab: W0, its updates and W' there.
        sums: the largest |Σ ± (W' - (W0 + δ))| / bound of all runs; 0 while W' is computed when
            it is read, see :class:`Writing`.
        update: ‖δ‖ of the whole weight.
    """

    places: Tensor
    of: int
    slab: Slab
    sums: float
    update: float


def sampled(
    layer: LoRALayer,
    parameter: str,
    merged: nn.Module,
    x: Tensor | None,
    sums: float | None = None,
) -> Sample | None:
    """The sample of a large weight; None of another, which is compared number by number.

    So is a large one that is more than a sum of products, or that may not be finite. ``sums`` are
    those that were made when W' was written; without them a held W' is summed up now.
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
        sums = _sums(layer, parameter, total, found, write=False) if sums is None else sums
        finite = math.isfinite(sums)
        there = found.index_select(axis, places)
    if not finite:
        return None
    slab = cut(layer, parameter, places, there.mT if turned else there)
    return Sample(places, of, slab, sums, total.norm())


@dataclass
class Writing:
    """How a merge writes its matrices.

    Attributes:
        mend: compute a large W' that does not hold its sums anew in float64, as the reference that
            it is checked against: what a certificate has passed is then still what the model gets.
        spares: memory for W'.
        sums: of the large W' that were written, by the names of their checks.
    """

    mend: bool = False
    spares: Spares = field(default_factory=Spares)
    sums: dict[str, float] = field(default_factory=dict[str, float])

    def write(
        self, check: str, layer: LoRALayer, parameter: str, total: Sum, size: int = BLOCK
    ) -> Tensor:
        """W', a sum of products."""
        weight = self.spares.take(total.stored)
        if weight.numel() <= LARGE:
            return total.through(weight, size=size)
        sums = _sums(layer, parameter, total, weight, write=True, size=size)
        if self.mend and not sums <= 1:
            weight = reference(layer, parameter)
            sums = _sums(layer, parameter, total, weight, write=False)
        self.sums[check] = sums
        return weight


def _large(layer: LoRALayer, parameter: str) -> Sum | None:
    shape = layer.changes(parameter)[0].layout.shape
    if len(shape) < 2 or math.prod(shape) <= LARGE:
        return None
    return sum_of(layer, parameter, layer.base_weight(parameter))


def _sums(
    layer: LoRALayer, parameter: str, total: Sum, merged: Tensor, *, write: bool, size: int = BLOCK
) -> float:
    """The largest |W' v - W0 v - L (R v)| / bound of all runs; NaN or infinite where W' is."""
    turned = layer.changes(parameter)[0].layout.transposed
    runs = Runs.of(total)
    total.through(merged, runs, write=write, size=size)
    pairs = products(layer.changes(parameter))
    carried = 4 * gamma(RUN + sum(p.r + 2 for p in pairs) + 4, roundoff(runs.size.dtype))
    rounded = 1.02 * roundoff(merged.dtype) if merged.dtype != runs.size.dtype else 0.0
    bound = runs.size.mul_(math.sqrt(RUN) * (rounded + carried)).add_(RUN * smallest(merged.dtype))
    for pair in pairs:
        left, right = (pair.B, pair.A) if not turned else (pair.A.mT, pair.B.mT)
        left, right = (f.detach().to(runs.signs) for f in (left * pair.scale, right))
        parts = cut_in_runs(right).view(len(right), -1, RUN)
        runs.base.addmm_(left, parts @ runs.signs)
        bound.addmm_(left.abs(), parts.abs().sum(-1), alpha=carried)
    return float(runs.merged.sub_(runs.base).abs_().div_(bound).max())
