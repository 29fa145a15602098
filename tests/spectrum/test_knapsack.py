"""The search for ranks: it says when it did not look everywhere, and its bound stays true."""

from __future__ import annotations

import random

import pytest

from rankwise.spectrum import knapsack
from rankwise.spectrum.knapsack import Group, cheapest, finest


def groups() -> list[Group]:
    draw = random.Random(3)
    return [
        Group(
            cost, tuple(sorted((draw.random() for _ in range(12)), reverse=True)), ("layer",) * 12
        )
        for cost in (101, 211, 307, 401)
    ]


def cost(taken: tuple[int, ...]) -> int:
    return sum(group.cost * n for group, n in zip(groups(), taken, strict=True))


def left(taken: tuple[int, ...]) -> float:
    return sum(sum(group.energies[n:]) for group, n in zip(groups(), taken, strict=True))


def test_a_search_that_is_cut_short_is_feasible_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = cheapest(groups(), 3.0)
    monkeypatch.setattr(knapsack, "STATES", 1)
    short = cheapest(groups(), 3.0)
    assert whole.optimal
    assert not short.optimal
    assert left(short.taken) <= 3.0
    assert short.bound <= cost(whole.taken) <= cost(short.taken)


def test_a_budget_that_is_cut_short_is_feasible_too(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finest(groups(), 5000)
    monkeypatch.setattr(knapsack, "STATES", 1)
    short = finest(groups(), 5000)
    assert cost(short.taken) <= 5000
    assert short.bound <= left(whole.taken) <= left(short.taken)


def test_nothing_to_choose_is_a_choice() -> None:
    assert cheapest([], 0.0).taken == ()
    assert finest([], 10.0).taken == ()


def test_everything_is_taken_where_nothing_may_be_left_out() -> None:
    assert cheapest(groups(), 0.0).taken == (12, 12, 12, 12)


def test_nothing_is_taken_where_all_may_be_left_out() -> None:
    assert cheapest(groups(), 100.0).taken == (0, 0, 0, 0)
