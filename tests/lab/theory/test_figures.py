"""Figures of the rank experiments: the records' numbers, in words and as rows."""

import csv
import io
from dataclasses import replace

import pytest

from rankwise.lab.theory import figures


def rows_of(figure):
    return list(csv.DictReader(io.StringIO(figure.csv())))


def test_every_learned_error_stands_beside_its_bound(measured_record):
    figure = figures.error_by_rank(measured_record)
    rows = rows_of(figure)
    assert len(rows) == len(measured_record.bounds)
    for row, kept in zip(rows, measured_record.bounds, strict=True):
        assert (row["spectrum"], int(row["r"])) == (kept.spectrum, kept.r)
        assert float(row["learned error"]) == kept.error
        assert float(row["bound"]) == kept.bound
        if kept.bound > 1e-20:
            assert float(row["learned / bound"]) == pytest.approx(kept.error / kept.bound)
        else:
            assert row["learned / bound"] == ""
    assert [key.label for key in figure.key] == ["exact rank", "power law", "exponential", "flat"]


def test_the_distance_from_the_bound_is_told(measured_record):
    figure = figures.distance(measured_record)
    assert all(abs(float(row["learned / bound − 1"])) < 0.01 for row in rows_of(figure))
    assert "flat: " in figure.alt
    assert figure.svg.count("<text") > 5


def test_a_distance_that_is_rounding_is_drawn_at_the_floor(made_record):
    bounds = tuple(replace(row, error=row.bound) for row in made_record.bounds)
    figure = figures.distance(replace(made_record, bounds=bounds))
    assert {row["learned / bound − 1"] for row in rows_of(figure)} == {"0.0"}


@pytest.mark.parametrize(
    ("draw", "learned", "bound"),
    [
        (figures.inputs_loss, "loss", "loss_bound"),
        (figures.inputs_weights, "error", "error_of_regression"),
    ],
)
def test_both_bounds_are_drawn_under_other_inputs(measured_record, draw, learned, bound):
    figure = draw(measured_record)
    assert len(figure.key) == 3
    for row, kept in zip(figure.rows, measured_record.inputs, strict=True):
        assert row[:3] == (kept.r, getattr(kept, learned), getattr(kept, bound))


def test_the_error_from_samples_is_shown_with_its_parts(measured_record):
    figure = figures.samples(measured_record)
    rows = rows_of(figure)
    assert [int(row["samples"]) for row in rows] == [12] * 6 + [96] * 6
    for row in rows:
        parts = sum(float(row[part]) for part in ("of rank", "of estimation", "of training"))
        assert float(row["error"]) == pytest.approx(parts)
        assert float(row["standard error"]) > 0
    assert len(figure.key) == 1 + 2 * 2
    assert "from 12 samples the error is least at r = " in figure.alt


def test_ticks_of_a_logarithmic_axis_are_powers_of_ten(measured_record):
    svg = figures.distance(measured_record).svg
    assert "10⁻" in svg
    assert "mathdefault" not in svg
