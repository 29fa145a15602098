"""The rank that holds the energy, against numpy, and its figure."""

import math

import numpy as np
import pytest

from rankwise.errors import UserError
from rankwise.lab.energy import rank_holding, update_spectrum


@pytest.mark.parametrize("seed", range(20))
def test_the_rank_is_the_first_whose_cumulative_energy_suffices(seed):
    values = np.random.default_rng(seed).exponential(size=12)
    energy = np.cumsum(np.sort(values)[::-1] ** 2)
    wanted = int(np.searchsorted(energy / energy[-1], 0.9)) + 1
    assert rank_holding(values.tolist()) == wanted


def test_the_rank_of_a_matrix_holds_all_of_its_energy():
    rng = np.random.default_rng(0)
    W = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 20))
    assert rank_holding(np.linalg.svd(W, compute_uv=False).tolist(), share=1.0) == 3


@pytest.mark.parametrize("scale", [1e-200, 1e-8, 1e200])
def test_the_scale_does_not_matter(scale):
    assert rank_holding([3 * scale, scale, scale]) == 2


def test_equal_values_share_the_energy_evenly():
    assert rank_holding([1.0] * 10) == 9  # nine tenths, though 0.9 is no binary fraction


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0]])
def test_a_zero_update_needs_no_rank(values):
    assert rank_holding(values) is None


def test_the_figure_holds_every_value(spectra):
    figure = update_spectrum(spectra)
    assert figure is not None
    assert figure.columns == ("layer", "k", "singular value", "energy held", "rank for 90 %")
    assert len(figure.rows) == 12 * 8
    for name, values in spectra.items():
        rows = [row for row in figure.rows if row[0] == name]
        squares = np.array(values) ** 2
        assert [row[2] for row in rows] == values
        assert [row[3] for row in rows] == pytest.approx(np.cumsum(squares) / squares.sum())
        assert {row[4] for row in rows} == {rank_holding(values)}
    assert [key.label for key in figure.key] == ["query", "value", "90 % of the energy"]


def test_values_are_taken_largest_first():
    figure = update_spectrum({"a": [1.0, 3.0, 2.0]})
    assert figure is not None
    assert [row[2] for row in figure.rows] == [3.0, 2.0, 1.0]


def test_layers_that_learned_nothing_are_listed_and_not_drawn():
    figure = update_spectrum({"a.query": [1.0, 0.5], "b.query": [0.0, 0.0]})
    assert figure is not None
    assert "exactly zero are not drawn: 1." in figure.caption
    assert [row for row in figure.rows if row[0] == "b.query"] == [
        ("b.query", 1, 0.0, None, None),
        ("b.query", 2, 0.0, None, None),
    ]


def test_there_is_no_figure_of_nothing():
    assert update_spectrum({}) is None
    assert update_spectrum({"a": [0.0]}) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_singular_value_is_finite_and_not_negative(value):
    with pytest.raises(UserError, match=r"singular values of layer\.0"):
        update_spectrum({"layer.0": [1.0, value]})
