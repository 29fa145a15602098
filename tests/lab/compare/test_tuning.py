"""The search: what it tries, where it goes, and that it depends on what was tried alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.lab.compare.tuning import (
    Outcome,
    Settled,
    best_rate,
    ladder,
    nearest_rung,
    search,
    sparing_rate,
)


def test_the_ladder_is_one_and_three_times_powers_of_ten():
    assert [ladder(i) for i in range(-5, 4)] == [
        *(0.003, 0.01, 0.03, 0.1, 0.3),
        *(1.0, 3.0, 10.0, 30.0),
    ]


@pytest.mark.parametrize(("rate", "near"), [(1e-3, 1e-3), (5e-5, 3e-5), (5e-3, 3e-3), (7e-3, 1e-2)])
def test_a_default_has_its_nearest_rung(rate, near):
    assert ladder(nearest_rung(rate)) == near


def run(score, centre=1e-3, rates=3, widen=3, metric="accuracy"):
    """Search with a known score for each rate; returns what was tried, in order, and the end."""
    tried: dict[float, Outcome] = {}
    while True:
        found = search(centre, tried, metric, rates, widen)
        if isinstance(found, Settled):
            return list(tried), found
        assert found
        for rate in found:
            assert rate not in tried
            value = score(rate)
            tried[rate] = value if isinstance(value, Outcome) else Outcome(value, 0.0)


def peak(at):
    return lambda rate: -abs(math.log(rate / at))


def test_a_peak_inside_ends_the_search():
    assert run(peak(1e-3)) == ([3e-4, 1e-3, 3e-3], Settled(1e-3))


def test_a_peak_at_the_edge_is_followed():
    assert run(peak(1e-2)) == ([3e-4, 1e-3, 3e-3, 1e-2, 3e-2], Settled(1e-2))
    assert run(peak(1e-4)) == ([3e-4, 1e-3, 3e-3, 1e-4, 3e-5], Settled(1e-4))


def test_the_search_goes_so_far_and_says_where_it_stopped():
    tried, found = run(lambda rate: rate)
    assert found == Settled(1e-1, at_edge=True)
    assert max(tried) == 1e-1
    assert run(lambda rate: rate, widen=0)[1] == Settled(3e-3, at_edge=True)
    assert run(lambda rate: -rate)[1] == Settled(1e-5, at_edge=True)


def test_a_loss_is_better_when_it_is_lower():
    assert run(lambda rate: -peak(1e-3)(rate), metric="loss")[1] == Settled(1e-3)


NONE = Outcome(math.nan, math.nan)


def test_rates_that_diverge_are_never_the_best():
    assert run(lambda rate: NONE if rate > 1e-3 else rate)[1] == Settled(1e-3)
    tried, found = run(lambda rate: NONE if rate > 1e-4 else peak(3e-5)(rate))
    assert (min(tried), found) == (1e-5, Settled(3e-5))


def test_where_nothing_trains_there_is_no_rate():
    tried, found = run(lambda rate: NONE)
    assert found == Settled(None, at_edge=True)
    assert min(tried) == 1e-5  # smaller ones were tried, as far as the search may go


def test_equal_scores_are_told_apart_by_the_loss_then_the_rate():
    tried = {1e-3: Outcome(0.5, 1.0), 3e-3: Outcome(0.5, 0.9), 1e-2: Outcome(0.5, 0.9)}
    assert best_rate(list(tried), tried, "accuracy") == 3e-3
    tried[1e-3] = Outcome(0.5, math.nan)
    assert best_rate([1e-3, 1e-2], tried, "accuracy") == 1e-2


@given(st.lists(st.floats(0, 1) | st.just(math.nan), min_size=30, max_size=30), st.data())
def test_the_order_in_which_runs_end_does_not_matter(scores, data):
    """Any part of what is asked for may be there already, as after an interruption."""

    def score(rate):
        return Outcome(scores[nearest_rung(rate) % 30], 1.0)

    wanted = run(score)[1]
    tried: dict[float, Outcome] = {}
    while isinstance(found := search(1e-3, tried, "accuracy", 3, 3), list):
        done = data.draw(st.sampled_from(found))
        tried[done] = score(done)
    assert found == wanted


@pytest.mark.parametrize(
    ("scores", "metric", "rate"),
    [
        ({1e-3: 0.5, 1e-2: 0.69, 3e-2: 0.70, 1e-1: 0.695}, "accuracy", 1e-2),  # 95 % of the gain
        ({1e-3: 0.5, 1e-2: 0.68, 3e-2: 0.70, 1e-1: 0.695}, "accuracy", 3e-2),
        ({1e-3: 0.9, 1e-2: 0.42, 3e-2: 0.40}, "loss", 1e-2),
        ({1e-3: 0.6, 1e-2: 0.6}, "accuracy", 1e-3),  # nothing gained anywhere
        ({1e-4: 2.08, 1e-3: 1.9, 1e-2: 1.2, 1e-1: 60.0}, "loss", 1e-2),  # what explodes is above
        ({1e-3: 0.6, 1e-2: math.nan}, "accuracy", 1e-3),
        ({1e-3: math.nan}, "accuracy", None),
        ({}, "accuracy", None),
    ],
)
def test_the_lowest_rate_that_keeps_almost_all_of_the_gain(scores, metric, rate):
    tried = {rate: Outcome(score, 1.0) for rate, score in scores.items()}
    assert sparing_rate(tried, metric) == rate
