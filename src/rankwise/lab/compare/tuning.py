"""The search for a learning rate: which rates to try next, and which one is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankwise.train.metrics import better

__all__ = [
    "KEPT",
    "Outcome",
    "Settled",
    "best_rate",
    "ladder",
    "nearest_rung",
    "search",
    "sparing_rate",
]

KEPT = 0.95
"""Share of what a search gained that :func:`sparing_rate` keeps."""


@dataclass(frozen=True)
class Outcome:
    """What came of one run: its score and its loss at the end, NaN where there is none."""

    score: float
    loss: float

    @property
    def diverged(self) -> bool:
        """Whether the run has no score, as when its loss was no finite number any more."""
        return math.isnan(self.score)


@dataclass(frozen=True)
class Settled:
    """A search that is over.

    Attributes:
        rate: the best learning rate; None when every one diverged.
        at_edge: whether the search ended with its best rate at its edge, so that a better one may
            lie beyond it.
    """

    rate: float | None
    at_edge: bool = False


def ladder(rung: int) -> float:
    """The learning rate on a rung: 1 on 0, 3 on 1, 10 on 2, 0.3 on -1, 0.1 on -2 and so on."""
    power, half = divmod(rung, 2)
    return float(f"{3 if half else 1}e{power}")


def nearest_rung(rate: float) -> int:
    """The rung of the :func:`ladder` whose rate is nearest, by their ratio."""
    return min(range(-40, 11), key=lambda rung: abs(math.log(ladder(rung) / rate)))


def search(
    centre: float, tried: Mapping[float, Outcome], metric: str, rates: int, widen: int
) -> list[float] | Settled:
    """The rates that are to be tried now, or what the search has settled on.

    The first ``rates`` rates are the rung of the :func:`ladder` that is nearest to ``centre`` and
    as many on either side. While the best of them is at an edge, the search goes one rung further
    there, ``widen`` times at most. It is a function of what was tried alone, so that a search that
    was interrupted goes on as if it had not been.
    """
    rung = nearest_rung(centre)
    low, high = rung - rates // 2, rung + rates // 2
    for steps_left in range(widen, -1, -1):
        window = [ladder(i) for i in range(low, high + 1)]
        missing = [rate for rate in window if rate not in tried]
        if missing:
            return missing
        best = best_rate(window, tried, metric)
        if best is not None and best not in (window[0], window[-1]):
            return Settled(best)
        if steps_left == 0:
            return Settled(best, at_edge=True)
        if best == window[-1]:
            high += 1
        else:  # the lowest is the best, or all have diverged
            low -= 1
    raise AssertionError("unreachable")


def sparing_rate(tried: Mapping[float, Outcome], metric: str) -> float | None:
    """The lowest rate that keeps 95 % of what the best gained over the worst below it, or None.

    For an output layer that learns beside something else. Alone, on features that stay, it often
    scores alike over a range of rates whose upper end is best by luck; on features that move, the
    lower end shakes them less.
    """
    best = best_rate(list(tried), tried, metric)
    if best is None:
        return None
    sign = 1.0 if better(metric, 1.0, 0.0) else -1.0
    below = {rate: sign * tried[rate].score for rate in tried if rate <= best}
    gains = {rate: gain for rate, gain in below.items() if not math.isnan(gain)}
    enough = min(gains.values()) + KEPT * (gains[best] - min(gains.values()))
    return min(rate for rate, gain in gains.items() if gain >= enough)


def best_rate(rates: Sequence[float], tried: Mapping[float, Outcome], metric: str) -> float | None:
    """The rate with the best score; of equal scores that of lower loss, then the lower rate."""
    sign = -1.0 if better(metric, 1.0, 0.0) else 1.0

    def order(rate: float) -> tuple[float, float, float]:
        loss = tried[rate].loss
        return sign * tried[rate].score, math.inf if math.isnan(loss) else loss, rate

    return min((rate for rate in rates if not tried[rate].diverged), key=order, default=None)
