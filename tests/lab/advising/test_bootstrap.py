"""The bootstrap's bounds are those of the mean's sampling distribution."""

from __future__ import annotations

import numpy as np
import pytest

from rankwise.lab.advising.bootstrap import interval


def test_the_bounds_are_those_of_the_normal_for_many_rows() -> None:
    d = np.random.default_rng(1).normal(0.2, 1.0, 2000)
    low, high = interval(d)
    error = d.std(ddof=1) / np.sqrt(len(d))
    assert low == pytest.approx(d.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(d.mean() + 1.96 * error, abs=0.15 * error)


def test_they_hold_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(2)
    samples = draw.choice([-1.0, 0.0, 1.0], size=(200, 150), p=[0.1, 0.7, 0.2])
    held = [low <= 0.1 <= high for low, high in (interval(s) for s in samples)]
    assert 0.89 <= np.mean(held) <= 0.99


def test_equal_rows_leave_no_doubt_and_the_same_rows_give_the_same_bounds() -> None:
    assert interval(np.full(9, 0.5)) == (0.5, 0.5)
    d = np.random.default_rng(3).normal(size=40)
    assert interval(d) == interval(d[::-1].copy())
