"""Random orders that are the same on every machine and Python version."""

from __future__ import annotations

import random

__all__ = ["permutation"]


def permutation(n: int, *seed: object) -> list[int]:
    """0 … n-1 in an order set by ``seed`` alone.

    Rows are sorted by random keys because Python promises that ``random()`` keeps its sequence
    from version to version, and does not promise it of ``shuffle`` and ``sample``.
    """
    generator = random.Random(":".join(map(str, seed)))
    keys = [generator.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)
