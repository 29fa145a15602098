"""The change between two adapters is paired row by row, and never claimed within the noise."""

from __future__ import annotations

import numpy as np
import pytest

from rankwise.lab.changes import change
from rankwise.train.answers import Answers
from rankwise.train.trying import Quality


def quality(right: np.ndarray) -> Quality:
    n = len(right)
    answers = Answers(
        rows=np.arange(n),
        losses=np.where(right, 0.1, 2.0),
        targets=np.ones(n, dtype=np.int64),
        labels=np.ones(n),
        predictions=right.astype(np.float64),
        classes=2,
    )
    return Quality({"accuracy": float(right.mean()), "loss": float(answers.losses.mean())}, answers)


def test_the_noise_is_that_of_mcnemars_pairs() -> None:
    first, second = np.ones(100, dtype=bool), np.ones(100, dtype=bool)
    first[:10], second[5:25] = False, False
    found = change(quality(first), quality(second), "accuracy")
    d = second.astype(float) - first.astype(float)
    assert found.difference == pytest.approx(-0.1)
    assert found.noise is not None
    assert found.noise.standard_error == pytest.approx(np.sqrt(d.var(ddof=1) / 100))
    assert found.worse
    assert "worse by more than the noise" in found.line()
    back = change(quality(second), quality(first), "accuracy")
    assert not back.worse
    assert "better by more than the noise" in back.line()


def test_a_loss_is_worse_when_it_rises() -> None:
    first, second = np.ones(100, dtype=bool), np.ones(100, dtype=bool)
    second[:30] = False
    assert change(quality(first), quality(second), "loss").worse
    assert not change(quality(second), quality(first), "loss").worse


def test_a_small_difference_is_no_more_than_noise() -> None:
    first, second = np.ones(100, dtype=bool), np.ones(100, dtype=bool)
    second[0] = False
    found = change(quality(first), quality(second), "accuracy")
    assert not found.worse
    assert "no more than the noise" in found.line()
    assert not change(quality(first), quality(first), "accuracy").worse


def test_where_noise_is_unknown_a_loss_counts_as_one() -> None:
    one = quality(np.array([True]))
    worse = quality(np.array([False]))
    found = change(one, worse, "accuracy")
    assert found.noise is None
    assert found.worse
    assert "do not tell" in found.line()
