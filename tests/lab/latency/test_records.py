"""Medians, paired ratios and their intervals, on times that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rankwise.errors import UserError
from rankwise.lab.latency import Sizes, Timing


def test_ratios_are_taken_within_a_round(written) -> None:
    """The plain times differ fourfold between rounds, and the ratio does not at all."""
    ratio = written.ratio("LoRA, unmerged", 4, 16)
    assert (ratio.middle, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert written.ratio("plain", 4, 16).middle == 1.0
    assert written.seconds("plain", 4, 16).middle == 1.0
    assert written.cells == ((4, 16),)


def test_the_interval_covers_the_median_as_often_as_it_says(written) -> None:
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        seconds = tuple(draw.lognormal(0.0, 0.3, size=25))
        timings = (Timing("plain", 4, 16, seconds),)
        found = replace(written, timings=timings).seconds("plain", 4, 16)
        assert found.low <= found.middle <= found.high
        covered += found.low <= 1.0 <= found.high  # exp(0), the true median
    assert 88 <= covered <= 100


def test_sizes_that_mean_nothing_are_refused_together() -> None:
    with pytest.raises(UserError) as caught:
        Sizes((0,), (), rounds=2)
    for words in ("batch sizes must be", "lengths must be", "rounds must be 3 or more"):
        assert words in str(caught.value)
