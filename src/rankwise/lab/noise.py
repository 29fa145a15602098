"""Whether a difference is larger than the noise over rows and seeds, with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import EnvironmentFault

__all__ = ["LEVEL", "Noise", "Term", "combine", "holm", "interval_of_seeds"]

LEVEL = 0.05
"""A difference whose corrected p is at most this is called larger than the noise."""


@dataclass(frozen=True, eq=False)
class Term:
    """One score in a sum of scores: its weight, and what every row contributed under each seed.

    Attributes:
        weight: of the score in the sum.
        rows: contributions (n, K) of n rows under K seeds; the rows are those of the other terms.
        scores: the score under each seed, (K,).
    """

    weight: float
    rows: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """How far a number may be from what it would be on other rows and under other seeds.

    Attributes:
        standard_error: of the number, over rows and seeds.
        degrees: of freedom, by Satterthwaite's formula.
    """

    standard_error: float
    degrees: float

    def half_width(self, share: float = 1 - LEVEL) -> float:
        """Half the width of the interval that holds such a share of the probability."""
        if self.standard_error == 0:
            return 0.0
        return self.standard_error * float(_student().isf((1 - share) / 2, self.degrees))

    def p(self, number: float) -> float:
        """The probability of a number as far from zero as this or farther, were the truth zero."""
        if self.standard_error == 0:
            return 1.0 if number == 0 else 0.0
        return 2 * float(_student().sf(abs(number) / self.standard_error, self.degrees))


def combine(terms: Sequence[Term]) -> Noise | None:
    """The noise of Σ w_j q_j, paired over the rows; None where no spread can be seen.

    Formula (docs/math.md (22)): with d_i = Σ_j w_j ū_ij, ū_ij the mean contribution of row i to
    score j over its K_j seeds, and s² a sample variance,

        SE² = s²(d) / n + Σ_j w_j² s²(q_j) / K_j

    The first part is that of other rows; it is paired, for all scores were had on the same rows.
    The second is that of other seeds, and is left out where a score has one seed only. The degrees
    of freedom are Satterthwaite's (1946), over all parts.
    """
    count = len(terms[0].rows)
    if count < 2:
        return None
    mixed = sum((t.weight * t.rows.mean(axis=1) for t in terms), start=np.zeros(count))
    parts = [(float(mixed.var(ddof=1)) / count, count - 1)]
    for term in terms:
        seeds = len(term.scores)
        if seeds > 1:
            spread = term.weight**2 * float(term.scores.var(ddof=1)) / seeds
            parts.append((spread, seeds - 1))
    total = math.fsum(variance for variance, _ in parts)
    if total == 0:
        return Noise(0.0, math.inf)
    below = math.fsum(variance**2 / degrees for variance, degrees in parts)
    return Noise(math.sqrt(total), total**2 / below)


def interval_of_seeds(scores: Sequence[float]) -> float | None:
    """Half the 95 % interval of a mean over seeds, t s / √K; None for one seed."""
    if len(scores) < 2:
        return None
    noise = Noise(stdev(scores) / math.sqrt(len(scores)), len(scores) - 1)
    return noise.half_width()


def holm(chances: Sequence[float]) -> list[float]:
    """The p of several tests, corrected so that a single false claim among all of them is rare.

    Formula: the k-th smallest of m becomes max over j ≤ k of min(1, (m − j + 1) p_(j)), and is to
    be compared with the level itself. Holm 1979, Scandinavian Journal of Statistics 6.
    """
    order = sorted(range(len(chances)), key=chances.__getitem__)
    found = [0.0] * len(chances)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(chances) - place) * chances[index]))
        found[index] = largest
    return found


def _student():
    """Student's distribution; SciPy's types are incomplete."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise EnvironmentFault(
            "Tests of significance need SciPy, which is not installed. "
            'Install it with: pip install "rankwise[text]"'
        ) from error
    return t
