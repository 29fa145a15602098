"""Sentences that say what the records hold, and say so where it does not hold."""

import math
from dataclasses import replace

import pytest

from rankwise.lab.theory import Bound, Cell, Samples
from rankwise.lab.theory import findings as f


def changed(record, table, place, **values):
    rows = list(getattr(record, table))
    rows[place] = replace(rows[place], **values)
    return replace(record, **{table: tuple(rows)})


@pytest.mark.parametrize(
    ("error", "bound", "met"),
    [(1.0099, 1, True), (1.0101, 1, False), (0.9, 1, True), (1e-6, 0, True), (2e-6, 1e-30, False)],
)
def test_a_bound_is_reached_within_one_percent_or_the_tolerance(error, bound, met):
    assert f.reaches(error, bound) is met


def test_where_everything_holds_it_is_said(made_record):
    told = f.about_bounds(made_record)
    assert told[0].startswith("At all of the 12 pairs of a spectrum and a rank, the learned error")
    assert "by 0.001 of it" in told[1]
    assert told[2] == "Where the bound is 0, at most 10⁻⁹ of ‖Δ*‖² is left."
    assert told[3].startswith("With every rank the error falls")
    assert f.about_inputs(made_record)[0].startswith("At all of the 6 ranks")


def test_where_something_does_not_hold_it_is_said(made_record):
    worse = changed(made_record, "bounds", 4, error=0.9)
    told = f.about_bounds(worse)
    assert told[0].startswith("At 11 of the 12 pairs")
    assert "the exact rank spectrum at r = 3, by 0.8 of it" in told[1]
    assert told[3] == "The error does not fall with every rank for: exact rank."
    other = f.about_inputs(changed(made_record, "inputs", 1, loss=9.0))
    assert other[0].startswith("At 5 of the 6 ranks")


def test_an_error_that_is_as_good_as_zero_need_not_fall():
    rows = [Bound("flat", r, error, 0, 0) for r, error in ((1, 0.5), (2, 1e-9), (3, 2e-9))]
    assert f.falls(rows[::-1])
    assert not f.falls([*rows, Bound("flat", 4, 0.1, 0, 0), Bound("flat", 5, 0.2, 0, 0)])


def test_the_plain_svd_is_compared_in_the_loss_and_in_the_weights(made_record):
    told = f.about_inputs(made_record)
    assert "has up to 2 times that loss" in told[1]
    assert "has up to 1.5 times the squared error" in told[2]


def samples_of(learned):
    return tuple(
        Samples(50, r, 0.1, tuple(errors), tuple(errors)) for r, errors in enumerate(learned, 1)
    )


def test_the_best_rank_from_samples_is_told_with_its_parts(made_record):
    rows = samples_of([[0.5, 0.5, 0.5], [0.19, 0.2, 0.21], [0.39, 0.4, 0.42]])
    told = f.about_samples(replace(made_record, samples=rows))
    assert told[0] == (
        "From 50 samples the error is least at r = 2: 20 % of ‖Δ*‖², of which 10 % come from the "
        "rank and 10 % from estimation. At full rank (r = 3) it is 40.3 %, 20.3 points more "
        "(standard error 0.333 points)."
    )
    assert told[1].endswith("the errors differ by at most 0 of ‖Δ*‖².")


def test_a_difference_within_the_noise_is_not_claimed(made_record):
    rows = samples_of([[0.5, 0.5], [0.1, 0.3], [0.2, 0.22]])
    told = f.about_samples(replace(made_record, samples=rows))
    assert "not told apart" in told[0]


def cells(lefts, rule="fixed α"):
    return [
        Cell("Adam", rule, r, 1.0, 2.0**place, left)
        for r, row in lefts.items()
        for place, left in enumerate(row)
    ]


def test_a_cell_trains_stalls_or_diverges():
    made = cells({1: [0.1, 0.11, None]})
    assert [f.outcome(cell) for cell in made] == ["trains", "stalls", "diverges"]


def test_the_rates_that_train_at_every_rank_are_told(made_record):
    grid = cells({1: [0.9, 0.0, 0.0, None], 2: [0.0, 0.0, 0.0, 0.0]})
    told = f.about_scaling(replace(made_record, scaling=tuple(grid)))
    verdict = "Adam, fixed α: 2 to 4 train at every rank from 1 to 2"
    assert told == [f"{verdict}; 2 to 4 train at r = 1; 1 to 8 train at r = 2."]


def test_where_no_rate_trains_at_every_rank_it_is_said(made_record):
    grid = cells({1: [0.0, None, None], 2: [0.9, 0.9, 0.0], 3: [1.0, 1.0, 1.0]})
    told = f.about_scaling(replace(made_record, scaling=tuple(grid)))[0]
    assert "no learning rate that was tried trains at every rank from 1 to 3" in told
    assert "1 trains at r = 1; no rate trains at r = 3" in told


def test_rates_with_a_gap_between_them_are_told_as_runs():
    assert f.rates_told([0.25, 0.5, 1.0, 8.0]) == "0.25 to 1 and 8"
    assert f.rates_told([2.0]) == "2"
    assert f.rates_told([]) == "no rate"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (0.0123, "0.012"),
        (1234.0, "1.2e+03"),
        (4.4e-9, "4·10⁻⁹"),
        (9.6e-10, "10⁻⁹"),
        (-2e-5, "-2·10⁻⁵"),
        (3e12, "3·10¹²"),
        (math.inf, "inf"),
    ],
)
def test_small_and_large_numbers_are_told_by_their_power_of_ten(value, said):
    assert f.told(value) == said
