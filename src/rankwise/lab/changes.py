"""How two adapters differ on the same rows: the difference of their scores, and its noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rankwise.lab import words
from rankwise.lab.noise import LEVEL, Noise, Term, combine
from rankwise.lab.settings import higher_is_better
from rankwise.train.trying import Quality

__all__ = ["Change", "change"]


@dataclass(frozen=True)
class Change:
    """From one adapter to another, on the same rows.

    Attributes:
        metric: what is measured.
        before, after: the scores.
        noise: how far the difference may be from that on other rows; None where it is not known.
    """

    metric: str
    before: float
    after: float
    noise: Noise | None

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def worse(self) -> bool:
        """Whether the second is worse by more than the noise; by anything where that is unknown."""
        lost = -self.difference if higher_is_better(self.metric) else self.difference
        if self.noise is None:
            return lost > 0 or not math.isfinite(lost)
        return lost > 0 and self.noise.p(self.difference) <= LEVEL

    def line(self) -> str:
        """The change as a sentence."""
        told = (
            f"{self.metric} {words.score(self.metric, self.before)} → "
            f"{words.score(self.metric, self.after)}"
        )
        if self.noise is None:
            return f"{told}; the rows do not tell how large noise is."
        wide = words.amount(self.metric, self.noise.half_width())
        size = words.amount(self.metric, self.difference)
        verdict = "worse by more than the noise" if self.worse else "no more than the noise"
        if not self.worse and self.difference and self.noise.p(self.difference) <= LEVEL:
            verdict = "better by more than the noise"
        return f"{told}: {size}, ± {wide} over other rows; {verdict}."


def change(before: Quality, after: Quality, metric: str) -> Change:
    """The change of a metric, paired row by row. docs/math.md (22)."""
    scores = before.metrics[metric], after.metrics[metric]
    rows = [quality.answers.contributions(metric) for quality in (before, after)]
    noise = None
    if rows[0] is not None and rows[1] is not None:
        terms = [
            Term(weight, own[:, None], np.asarray([score]))
            for weight, own, score in zip((-1.0, 1.0), rows, scores, strict=True)
            if own is not None
        ]
        noise = combine(terms)
    return Change(metric, *scores, noise)
