"""The search for the smallest cut that is as good as the probe: what to try, what is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rankwise.errors import UserError
from rankwise.lab.advising.bootstrap import interval
from rankwise.lab.advising.records import EVERY_LAYER, PER_LAYER, Step, Trial, smallest
from rankwise.lab.settings import higher_is_better
from rankwise.spectrum import Allocation, Budget, Layer, Top
from rankwise.train.trying import Quality

__all__ = ["Grown", "Judge", "Probe", "grown", "search"]

FINE = 4
"""Steps of the budget for each step of the rank."""
NEGLIGIBLE = 0.01
"""A loss of at most this share of what the updates gain counts as none, however sure it is."""
TOLERABLE = 0.05
"""More than this share of what the updates gain is too much to lose, however unsure it is."""

Tried = Callable[[Mapping[str, int]], Quality]


@dataclass(frozen=True)
class Judge:
    """What is enough beside a probe.

    A cut is enough when the bounds of what it loses (:func:`interval`, paired over the rows) hold
    zero or lie below it, and it loses at most a twentieth of what the updates gain; or when it
    loses at most a hundredth, for what is lost may be sure and yet too small to matter. Where rows
    are few it may matter and yet not be sure, and a score of right and wrong may hide it. So at
    most a twentieth of what the updates take off the loss may come back, too.

    Attributes:
        metric: what quality is.
        probe: with all its ranks.
        silent: the probe without its updates.
    """

    metric: str
    probe: Quality
    silent: Quality

    @cached_property
    def gained(self) -> bool:
        """Whether the updates gain more than the noise."""
        return self.bounds(self.silent)[0] > 0

    def lost(self, found: Quality) -> float:
        """How much worse than the probe; below 0 where it is better."""
        change = self.probe.metrics[self.metric] - found.metrics[self.metric]
        return change if higher_is_better(self.metric) else -change

    def loss_back(self, found: Quality) -> float:
        """The share of what the updates take off the loss that comes back; 0 if they take none."""
        probe, own, silent = (q.metrics["loss"] for q in (self.probe, found, self.silent))
        return (own - probe) / (silent - probe) if silent > probe else 0.0

    def bounds(self, found: Quality) -> tuple[float, float]:
        """Between which bounds that lies over other rows.

        Raises:
            UserError: the metric cannot be had row by row from so few rows.
        """
        rows = [q.answers.contributions(self.metric) for q in (self.probe, found)]
        if rows[0] is None or rows[1] is None:
            raise UserError(
                f"{len(self.probe.answers.rows)} tuning rows do not tell how large the noise of "
                f"{self.metric} is. Give more --data, or a larger --eval-fraction."
            )
        change = rows[0] - rows[1]
        return interval(change if higher_is_better(self.metric) else -change)

    def trial(self, kind: str, size: int, allocation: Allocation, found: Quality) -> Trial:
        """The record of a cut."""
        return Trial(
            kind=kind,
            size=size,
            ranks=dict(allocation.ranks),
            parameters=allocation.parameters,
            error=allocation.error,
            **self._verdict(found),
        )

    def step(self, r: int, found: Quality) -> Step:
        """The record of a probe of rank r beside this one, which is of twice its rank."""
        score = self.probe.metrics[self.metric]
        return Step(r=r, larger=2 * r, larger_score=score, **self._verdict(found))

    def _verdict(self, found: Quality) -> dict[str, Any]:
        """The attributes of a :class:`Verdict`."""
        low, high = self.bounds(found)
        lost, gain = self.lost(found), self.lost(self.silent)
        back = self.loss_back(found)
        little = (lost <= TOLERABLE * gain and back <= TOLERABLE) or not self.gained
        return {
            "score": found.metrics[self.metric],
            "lost": lost,
            "low": low,
            "high": high,
            "loss_back": back,
            "enough": little and (low <= 0 or lost <= NEGLIGIBLE * gain),
        }


def search(layers: Mapping[str, Layer], r: int, judge: Judge, tried: Tried) -> Iterator[Trial]:
    """Try cuts of the probe, of both kinds, and close in on the smallest that is enough.

    First one rank for all layers, the powers of two below r and then between the largest that is
    not enough and the next; then budgets of the same sizes, spent where the σ² per parameter is
    largest, in steps a quarter as large.
    """
    whole = sum(layer.cost for layer in layers.values())

    def same(k: int) -> Trial:
        cut = Top(k).allocate(layers)
        return judge.trial(EVERY_LAYER, k, cut, tried(cut.ranks))

    def spread(step: int) -> Trial | None:
        try:
            cut = Budget(whole * step // FINE).allocate(layers)
        except UserError:  # less than one rank of one layer
            return None
        return judge.trial(PER_LAYER, step, cut, tried(cut.ranks))

    yield from _closing_in(same, _powers(r - 1), r)
    steps = [1, 2, *(FINE * k for k in _powers(r - 1))] if r > 1 else [1, 2]
    yield from _closing_in(spread, steps, FINE * r)


@dataclass(frozen=True)
class Probe:
    """A probe of rank r: the spectra of its layers, and what is enough beside it."""

    r: int
    layers: Mapping[str, Layer]
    judge: Judge


@dataclass(frozen=True)
class Grown:
    """The probe that stayed.

    Attributes:
        probe: of the smallest rank that is enough, as far as was tried.
        trials: its cuts; all of it is one where the next probe is no better.
        steps: the probes before it, and itself if a larger one was tried, each beside the next.
    """

    probe: Probe
    trials: tuple[Trial, ...]
    steps: tuple[Step, ...]


def grown(
    ranks: Sequence[int],
    opened: Callable[[int], Probe],
    searched: Callable[[Probe], tuple[Trial, ...]],
) -> Grown:
    """The first probe that has ranks to spare, or that the next does not beat.

    A probe has ranks to spare where half of them are enough in every layer: what a larger one has
    more would be cut as well. One that has none is put beside a probe of twice its rank, and stays
    if it is enough there, by the rule for cuts. One that gains nothing ends the search.

    Args:
        ranks: of the probes, each twice the one before.
        opened: makes the probe of a rank.
        searched: the cuts of the probe that was made last, tried.
    """
    probe = opened(ranks[0])
    trials, steps = searched(probe), list[Step]()
    for r in ranks[1:]:
        same = smallest([t for t in trials if t.kind == EVERY_LAYER])
        if not probe.judge.gained or (same is not None and same.size <= probe.r // 2):
            break
        larger = opened(r)
        steps.append(larger.judge.step(probe.r, probe.judge.probe))
        if steps[-1].enough:
            every = Top(probe.r).allocate(probe.layers)
            whole = probe.judge.trial(EVERY_LAYER, probe.r, every, probe.judge.probe)
            trials = (*trials, whole)
            break
        probe, trials = larger, searched(larger)
    return Grown(probe, trials, tuple(steps))


def _powers(most: int) -> list[int]:
    return [2**i for i in range(max(0, most).bit_length()) if 2**i <= most]


def _closing_in(
    attempt: Callable[[int], Trial | None], ladder: list[int], most: int
) -> Iterator[Trial]:
    """Try every rung, then halve the space between the largest failure and what is above it."""
    known: dict[int, bool] = {}
    for size in ladder:
        trial = attempt(size)
        known[size] = trial is not None and trial.enough
        if trial is not None:
            yield trial
    low = max((size for size, enough in known.items() if not enough), default=0)
    high = min((size for size in known if size > low), default=most)
    while high - low > 1:
        middle = (low + high) // 2
        trial = attempt(middle)
        if trial is not None:
            yield trial
        if trial is not None and trial.enough:
            high = middle
        else:
            low = middle
