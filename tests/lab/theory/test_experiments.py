"""What the small theory measured holds what the theorems say, and no work is done twice."""

from dataclasses import replace
from itertools import pairwise

import pytest

from rankwise.lab.theory import Theory, TheoryRecord
from rankwise.lab.theory.experiments import OPTIMIZERS, RULES, jobs, scaling_ranks


def test_every_rank_of_every_spectrum_is_within_one_percent_of_its_bound(measured_record, small):
    rows = measured_record.bounds
    assert len(rows) == 4 * 6
    assert {row.r for row in rows} == set(small.ranks)
    for row in rows:
        assert row.error == pytest.approx(row.bound, rel=1e-2, abs=1e-8), row
        assert row.gradient < 1e-3


def test_the_exact_rank_has_no_error_from_its_rank_on(measured_record):
    exact = {row.r: row for row in measured_record.bounds if row.spectrum == "exact rank"}
    assert exact[1].bound < 1e-20 or exact[2].bound < 1e-20
    assert all(row.error < 1e-8 for row in exact.values() if row.bound < 1e-20)


def test_the_error_falls_with_every_rank(measured_record):
    for name in {row.spectrum for row in measured_record.bounds}:
        errors = [row.error for row in measured_record.bounds if row.spectrum == name]
        assert all(b < a or a < 1e-8 for a, b in pairwise(errors)), name


def test_the_learned_update_follows_regression_and_not_the_plain_svd(measured_record):
    for row in measured_record.inputs:
        assert row.loss == pytest.approx(row.loss_bound, rel=1e-2, abs=1e-8)
        assert row.error == pytest.approx(row.error_of_regression, rel=1e-2, abs=1e-8)
    for row in measured_record.inputs[:-1]:
        assert row.loss_of_svd > 1.02 * row.loss_bound
        assert row.error > 1.02 * row.error_bound


def test_few_samples_cost_more_than_many_and_the_parts_add_up(measured_record):
    few, many = ([s for s in measured_record.samples if s.rows == n] for n in (12, 96))
    for row in (*few, *many):
        assert len(row.learned) == len(row.closed) == 3
        parts = row.of_rank + row.of_estimation + row.of_training
        assert row.error == pytest.approx(parts)
        assert abs(row.of_training) < 1e-3
        assert row.of_estimation > 0
    assert all(a.of_estimation > 2 * b.of_estimation for a, b in zip(few, many, strict=True))
    assert few[-1].of_estimation > few[0].of_estimation


def test_every_scaling_is_tried_at_every_rank_and_rate(measured_record, small):
    cells = measured_record.scaling
    assert scaling_ranks(small) == [1, 2, 4]
    assert len(cells) == 3 * 3 * sum(len(rates) for _, rates in OPTIMIZERS.values())
    by_rule = {rule: {c.r: c.scale for c in cells if c.rule == rule} for rule in RULES}
    assert by_rule["fixed α"] == {1: 16, 2: 8, 4: 4}
    assert by_rule["α = 2r"] == {1: 2, 2: 2, 4: 2}
    assert by_rule["α/√r"] == pytest.approx({1: 32**0.5, 2: 4, 4: 8**0.5})


def test_rates_stall_below_train_between_and_diverge_above(measured_record):
    for rule in RULES:
        for r in (1, 2, 4):
            left = [
                c.left
                for c in measured_record.scaling
                if (c.optimizer, c.rule, c.r) == ("gradient descent", rule, r)
            ]
            assert left[0] > 0.2
            assert any(value is not None and value < 0.1 for value in left)
            assert left[-1] is None


def test_the_three_scalings_agree_at_rank_eight():
    assert [scale(8) for scale in RULES.values()] == pytest.approx([2.0, 2.0, 2.0])


def test_what_is_done_is_not_done_again(measured_record, small):
    assert list(jobs(measured_record)) == []
    fresh = list(jobs(TheoryRecord(small)))
    assert len(fresh) == 6 + 2 * 3 * 3
    half = replace(measured_record, bounds=measured_record.bounds[:8], scaling=())
    assert [job.name for job in jobs(half)] == [job.name for job in fresh[2:]]


def test_another_seed_is_another_experiment(measured_record, small):
    other = next(jobs(TheoryRecord(replace(small, seed=1)))).run()
    same = next(jobs(TheoryRecord(small))).run()
    assert same["bounds"] == list(measured_record.bounds[:4])
    assert same["samples"] == list(measured_record.samples[:2])
    assert other["samples"] != same["samples"]


def test_the_default_size_needs_every_rank_of_its_layer():
    assert Theory().ranks == range(1, 25)
    assert scaling_ranks(Theory()) == [1, 2, 4, 8, 16, 32]
