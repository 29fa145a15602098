"""trim: an adapter cut to the ranks that a promise asks for, each cut with its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from rankwise.errors import UserError
from rankwise.lowrank import Factors
from rankwise.methods.adapter import Adapter
from rankwise.methods.combining.sums import Distance, common_dtype, distance
from rankwise.methods.restate import restated
from rankwise.spectrum import Allocation, Layer, Promise, spectrum

__all__ = ["Cut", "Prefix", "Trimmed", "cut_to", "first_ranks", "layers_of", "trim"]


@dataclass(frozen=True)
class Cut:
    """What became of one update.

    Attributes:
        before, after: its rank; after 0 it is gone.
        predicted: ‖δ − δ_k‖ / ‖δ‖ by the singular values.
        measured: the same, of the factors that were made.
    """

    before: int
    after: int
    predicted: float
    measured: Distance


@dataclass(frozen=True)
class Trimmed:
    """A cut adapter, and what that cost.

    Attributes:
        adapter: the cut adapter; every update has scale 1, so α is its rank. A prefix keeps the
            scales and the starts.
        allocation: how its ranks were chosen.
        cuts: by adapted weight.
    """

    adapter: Adapter
    allocation: Allocation
    cuts: Mapping[str, Cut]

    @property
    def error(self) -> float:
        """‖δ − δ_k‖ / ‖δ‖ over all weights together, of the factors that were made."""
        return Distance.over(cut.measured for cut in self.cuts.values()).error

    @property
    def parameters(self) -> int:
        """Numbers in A and B of the cut adapter."""
        return sum(f.count() for f in self.adapter.factors.values())


@dataclass(frozen=True)
class Prefix:
    """The first ranks of every layer, as they were trained: ``k`` of the largest rank.

    For an adapter of nested training (``rankwise fit --train-nested``), whose first ranks were
    trained to do without the others; in any other their order means nothing. Layers of a smaller
    rank keep the same share of theirs, see :func:`first_ranks`. The scale stays; of a start
    (A0, B0) the same ranks are kept, so that what is left out adds nothing.
    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise UserError(f"A prefix is a whole number of ranks of 1 or more, got {self.k!r}.")


def first_ranks(r: int, k: int, largest: int) -> int:
    """The first ranks of a layer of rank ``r`` that go with ``k`` of the largest: ⌈k/R · r⌉.

    What nested training shows in a step, and what a :class:`Prefix` keeps.
    """
    return min(r, -(-k * r // largest))


def trim(adapter: Adapter, promise: Promise | Prefix) -> Trimmed:
    """The smallest adapter that keeps a promise, its ranks chosen over all layers together.

    Every update becomes its best approximation of the chosen rank (Eckart-Young), with scale 1.
    The promise is kept by the singular values in float64; the factors are then rounded, to float32
    at least, and :attr:`Trimmed.error` is theirs. An update that is cut to rank 0 is left out of
    the adapter, which is what δ = 0 means and what every reader of its file understands; one with a
    DoRA magnitude or a trained bias keeps rank 1. Heads, biases, magnitudes and token rows stay as
    they are. A start (A0, B0) is part of its update.

    Raises:
        UserError: the promise cannot be kept, or the adapter is not finite or was never trained.
    """
    if isinstance(promise, Prefix):
        return _first(adapter, promise.k)
    chosen = promise.allocate(layers_of(adapter))
    made, cuts = _made(adapter, chosen.ranks)
    return Trimmed(made, chosen, cuts)


def cut_to(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The adapter with each update cut to its rank in ``ranks``, 0 leaving it out; see trim."""
    return _made(adapter, ranks)[0]


def layers_of(adapter: Adapter) -> dict[str, Layer]:
    """What ranks are chosen among: the spectrum of each update and what one rank of it costs."""
    return {
        name: Layer(spectrum(f), f.count() // f.r, _least(adapter, name))
        for name, f in adapter.factors.items()
    }


def _first(adapter: Adapter, k: int) -> Trimmed:
    largest = max((f.r for f in adapter.factors.values()), default=1)
    factors = {n: _prefix(f, first_ranks(f.r, k, largest)) for n, f in adapter.factors.items()}
    cuts: dict[str, Cut] = {}
    for name, whole in adapter.factors.items():
        away = _away(whole, factors[name].pair())
        cuts[name] = Cut(whole.r, factors[name].r, away.error, away)
    made = replace(adapter, method=restated(adapter.method, factors), factors=factors)
    parameters = sum(f.count() for f in factors.values())
    error = Distance.over(cut.measured for cut in cuts.values()).error
    ranks = {name: f.r for name, f in factors.items()}
    return Trimmed(made, Allocation(ranks, parameters, error, error, optimal=True), cuts)


def _prefix(f: Factors, k: int) -> Factors:
    A0 = None if f.A0 is None else f.A0[..., :k, :].contiguous()
    B0 = None if f.B0 is None else f.B0[..., :k].contiguous()
    return Factors(f.A[..., :k, :].contiguous(), f.B[..., :k].contiguous(), f.scale, A0, B0)


def _least(adapter: Adapter, name: str) -> int:
    """Ranks that an update keeps whatever they hold."""
    return int(name in adapter.magnitudes or f"{name}.bias" in adapter.biases)


def _made(adapter: Adapter, ranks: Mapping[str, int]) -> tuple[Adapter, dict[str, Cut]]:
    factors = {n: _shortened(f, ranks[n]) for n, f in adapter.factors.items() if ranks[n]}
    cuts = {
        name: Cut(
            before=whole.r,
            after=ranks[name],
            predicted=spectrum(whole).error(ranks[name]),
            measured=_away(whole, factors.get(name)),
        )
        for name, whole in adapter.factors.items()
    }
    made = replace(adapter, method=restated(adapter.method, factors), factors=factors)
    return made, cuts


def _shortened(factors: Factors, k: int) -> Factors:
    """δ_k with scale 1, rounded once."""
    dtype = common_dtype([factors])
    whole = _wide(factors).truncate(k)
    return Factors(whole.A.to(dtype).contiguous(), whole.B.to(dtype).contiguous(), 1.0)


def _away(whole: Factors, short: Factors | None) -> Distance:
    if short is None:
        zero = torch.zeros_like(whole.B)
        short = Factors(whole.A, zero, 1.0)
    return distance([_wide(whole)], short)


def _wide(factors: Factors) -> Factors:
    """The same δ without a start, in float64 before anything is subtracted."""
    A, B, A0, B0 = (
        None if t is None else t.detach().double()
        for t in (factors.A, factors.B, factors.A0, factors.B0)
    )
    assert A is not None
    assert B is not None
    return Factors(A, B, factors.scale, A0, B0).conditioned()
