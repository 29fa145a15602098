"""A paired bootstrap over rows: between which bounds a mean difference lies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["DRAWS", "interval"]

DRAWS = 4000
_CELLS = 4_000_000  # numbers drawn at a time


def interval(
    differences: NDArray[np.float64], *, share: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The bounds between which the mean of the differences lies, over other draws of the rows.

    ``differences`` (n,) has for each row what it contributes to one score less what it contributes
    to the other, so that rows that are easy or hard for both cancel. The rows are drawn anew, with
    replacement, 4,000 times; the bounds are the outer quantiles of the means (Efron 1979). Equal
    differences are drawn together, by their number.
    """
    values, counts = np.unique(differences, return_counts=True)
    if len(values) == 1:
        return float(values[0]), float(values[0])
    draw, n = np.random.default_rng(seed), len(differences)
    size = max(1, _CELLS // len(values))
    means: list[NDArray[np.float64]] = []
    for first in range(0, DRAWS, size):
        times = draw.multinomial(n, counts / n, size=min(size, DRAWS - first))
        means.append(times @ values / n)
    low, high = np.quantile(np.concatenate(means), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
