"""Timing programs against each other: in alternation, in one process, with an interval."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Ratio", "alternate", "ratio"]


@dataclass(frozen=True)
class Ratio:
    """How many times as long one program takes as another: a median and its 95 % interval."""

    value: float
    low: float
    high: float


def alternate(programs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round; every round runs all of them, in a shuffled order.

    One round more goes first and is not counted.
    """
    order = list(programs)
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for count in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            programs[name]()
            if count:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(first: list[float], second: list[float]) -> Ratio:
    """The median over rounds of first / second, with a bootstrap interval over the rounds."""
    each = [a / b for a, b in zip(first, second, strict=True)]
    draw = random.Random(0)
    made = sorted(statistics.median(draw.choices(each, k=len(each))) for _ in range(1000))
    return Ratio(statistics.median(each), made[24], made[974])
