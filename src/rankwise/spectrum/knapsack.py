"""Choosing ranks by cost and energy: exact where the search stays small, else with its bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Group", "Solution", "cheapest", "finest"]

Numbers = NDArray[np.float64]

STATES = 50_000
"""Partial choices kept at most; beyond it the most promising are, and nothing is proved."""
_CELLS = 2_000_000  # partial choices looked at together
_SLACK = 1e-12  # of a limit, for sums in another order


@dataclass(frozen=True)
class Group:
    """Ranks of one cost. Whatever their number, those with the most energy are the best of them.

    Attributes:
        cost: parameters of each.
        energies: σ² of each, falling.
        names: the layer of each.
    """

    cost: int
    energies: tuple[float, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Solution:
    """How many ranks of each group are taken.

    Attributes:
        taken: by group; a group's first ones.
        bound: no choice costs less (``cheapest``), or leaves out less energy (``finest``).
        optimal: whether no choice is better than this one.
    """

    taken: tuple[int, ...]
    bound: float
    optimal: bool


def cheapest(groups: Sequence[Group], allowed: float) -> Solution:
    """The least cost that leaves out at most ``allowed`` energy. docs/math.md (25)."""
    pairs = [(_tails(group), _costs(group)) for group in groups]
    relaxed = [_relaxed(groups[i:]) for i in range(len(groups) + 1)]
    curves = [(left[::-1], costs[::-1]) for costs, left in relaxed]
    found = _search(pairs, curves, allowed, _walk(groups, allowed=allowed))
    return Solution(found.taken, math.ceil(found.bound - 1e-6), found.optimal)


def finest(groups: Sequence[Group], budget: float) -> Solution:
    """The least energy left out at a cost of at most ``budget``. docs/math.md (25)."""
    pairs = [(_costs(group), _tails(group)) for group in groups]
    curves = [_relaxed(groups[i:]) for i in range(len(groups) + 1)]
    return _search(pairs, curves, budget, _walk(groups, budget=budget))


def _costs(group: Group) -> Numbers:
    """The cost of the first n, n = 0, 1, ...."""
    return group.cost * np.arange(len(group.energies) + 1, dtype=np.float64)


def _tails(group: Group) -> Numbers:
    """The energy that is left out when the first n are taken, n = 0, 1, ..., added from behind."""
    return np.append(np.cumsum(np.asarray(group.energies)[::-1])[::-1], 0.0)


def _order(groups: Sequence[Group]) -> list[tuple[int, float]]:
    """Group and energy of each rank, those with the most energy for their cost first."""
    every = [(i, e) for i, group in enumerate(groups) for e in group.energies]
    return sorted(every, key=lambda it: -it[1] / groups[it[0]].cost)


def _relaxed(groups: Sequence[Group]) -> tuple[Numbers, Numbers]:
    """Cost against energy left out where a part of a rank may be taken: the corners of the curve.

    Taking in the order of energy for cost is then the best there is (Dantzig 1957), so no whole
    choice lies below this curve.
    """
    order = _order(groups)
    costs = np.cumsum([0.0, *(groups[i].cost for i, _ in order)])
    left = np.cumsum([0.0, *(e for _, e in reversed(order))])[::-1]
    return costs, left


def _walk(groups: Sequence[Group], *, allowed: float = -1.0, budget: float = math.inf) -> list[int]:
    """A choice that keeps the promise: by energy for cost, as far as needed or paid for."""
    taken, closed = [0] * len(groups), [False] * len(groups)
    order, tails = _order(groups), [_tails(group) for group in groups]
    paid = 0
    for i, _ in order:
        left = sum(t[n] for t, n in zip(tails, taken, strict=True))
        if left <= allowed * (1 + _SLACK):
            break
        closed[i] = closed[i] or paid + groups[i].cost > budget
        if not closed[i]:
            taken[i] += 1
            paid += groups[i].cost
    return taken


def _search(
    pairs: Sequence[tuple[Numbers, Numbers]],
    curves: Sequence[tuple[Numbers, Numbers]],
    limit: float,
    walked: list[int],
) -> Solution:
    """The choice of least goal whose other sum stays within the limit.

    ``pairs`` are, for each group and number taken, what is limited and what is the goal; ``curves``
    the relaxed trade of both for the groups from the i-th on. Partial choices grow group by group;
    one is dropped when another is no worse in both sums, or when even the relaxed rest would not
    make it better than the best choice known.
    """
    best = sum(goal[n] for (_, goal), n in zip(pairs, walked, strict=True))
    bound = float(_rest(curves[0], np.asarray([limit]))[0])
    states = np.zeros((1, 2))
    taken = np.zeros((1, 0), dtype=np.int64)
    complete = True
    for i, (limited, goal) in enumerate(pairs):
        if best <= bound * (1 + _SLACK) or not len(states):
            break
        states, taken, chances = _grown(states, taken, limited, goal, curves[i + 1], limit, best)
        keep = _undominated(states)
        if len(keep) > STATES:
            complete, keep = False, keep[np.argsort(chances[keep], kind="stable")[:STATES]]
        states, taken = states[keep], taken[keep]
    whole = taken.shape[1] == len(pairs) and len(states) > 0
    chosen = taken[states[:, 1].argmin()].tolist() if whole else walked
    proved = complete or best <= bound * (1 + _SLACK)
    return Solution(tuple(chosen), bound, proved)


def _rest(curve: tuple[Numbers, Numbers], room: Numbers) -> Numbers:
    """The least goal of the relaxed rest within this much room; infinite without room."""
    least = np.interp(room, *curve)
    return np.where(room < 0, np.inf, least)


def _grown(
    states: Numbers,
    taken: NDArray[np.int64],
    limited: Numbers,
    goal: Numbers,
    curve: tuple[Numbers, Numbers],
    limit: float,
    best: float,
) -> tuple[Numbers, NDArray[np.int64], Numbers]:
    """Every partial choice with every number of the next group that may still beat the best."""
    made: list[tuple[Numbers, NDArray[np.int64], Numbers]] = []
    size = max(1, _CELLS // len(limited))
    for first in range(0, len(states), size):
        part = states[first : first + size]
        used = part[:, 0, None] + limited
        sums = part[:, 1, None] + goal
        chances = sums + _rest(curve, limit * (1 + _SLACK) - used)
        rows, numbers = np.nonzero(chances < best * (1 - _SLACK))
        both = np.column_stack([used[rows, numbers], sums[rows, numbers]])
        more = np.column_stack([taken[first : first + size][rows], numbers])
        made.append((both, more, chances[rows, numbers]))
    return (
        np.concatenate([m[0] for m in made]),
        np.concatenate([m[1] for m in made]),
        np.concatenate([m[2] for m in made]),
    )


def _undominated(states: Numbers) -> NDArray[np.int64]:
    """Which choices have no other that is as good in both sums."""
    order = np.lexsort((states[:, 1], states[:, 0]))
    goals = states[order, 1]
    before = np.minimum.accumulate(np.append(np.inf, goals[:-1])) if len(goals) else goals
    return order[goals < before]
