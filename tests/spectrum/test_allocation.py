"""Ranks over all layers together: every promise is kept, and exhaustive search finds no better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.spectrum import Budget, Energy, Layer, MaxError, Spectrum, Top

# repeated values, zeros, and a layer without any update are among them
spectra = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.75]), min_size=1, max_size=4).map(
    lambda values: Spectrum(tuple(sorted(values, reverse=True)))
)
several = st.lists(
    st.builds(Layer, spectra, st.sampled_from([3, 5, 7]), st.sampled_from([0, 0, 1])),
    min_size=1,
    max_size=4,
).map(lambda layers: {f"layer.{i}": layer for i, layer in enumerate(layers)})
trained = several.filter(lambda ls: any(layer.spectrum.rank for layer in ls.values()))


def every(layers: dict[str, Layer]) -> Iterator[tuple[int, float]]:
    """Parameters and relative error of every choice of ranks there is."""
    total = math.hypot(*(layer.spectrum.norm for layer in layers.values()))
    spans = [range(each.least, max(each.least, each.spectrum.rank) + 1) for each in layers.values()]
    for ranks in itertools.product(*spans):
        both = list(zip(layers.values(), ranks, strict=True))
        lost = math.hypot(*(layer.spectrum.tail(k) for layer, k in both))
        yield sum(layer.cost * k for layer, k in both), lost / total


@given(trained, st.floats(0, 0.99))
def test_no_smaller_adapter_keeps_the_error(layers: dict[str, Layer], error: float) -> None:
    found = MaxError(error).allocate(layers)
    assert found.error <= error * (1 + 1e-9)
    assert found.parameters == sum(k * layers[n].cost for n, k in found.ranks.items())
    least = min(cost for cost, lost in every(layers) if lost <= error * (1 + 1e-12))
    assert found.parameters == least
    assert found.optimal
    assert found.bound <= least


@given(trained, st.floats(0.01, 1))
def test_energy_is_an_error_in_other_words(layers: dict[str, Layer], share: float) -> None:
    found = Energy(share).allocate(layers)
    assert 1 - found.error**2 >= share - 1e-11
    least = min(cost for cost, lost in every(layers) if 1 - lost**2 >= share - 1e-13)
    assert found.parameters <= least


@given(trained, st.integers(1, 90))
def test_no_adapter_within_the_budget_is_nearer(layers: dict[str, Layer], budget: int) -> None:
    least = sum(layer.least * layer.cost for layer in layers.values())
    one = least or min(layer.cost for layer in layers.values() if layer.spectrum.rank)
    if budget < one:
        with pytest.raises(UserError, match=f"the smallest has {one}"):
            Budget(budget).allocate(layers)
        return
    found = Budget(budget).allocate(layers)
    assert found.parameters <= budget
    best = min(lost for cost, lost in every(layers) if cost <= budget)
    assert found.error == pytest.approx(best, abs=1e-9)
    assert found.optimal
    assert found.bound <= best + 1e-9


def test_layers_of_one_cost_give_their_largest_values_first() -> None:
    layers = {
        "strong": Layer(Spectrum((9.0, 8.0, 7.0)), 10),
        "weak": Layer(Spectrum((3.0, 2.0, 1.0)), 10),
    }
    assert Budget(30).allocate(layers).ranks == {"strong": 3, "weak": 0}
    assert Budget(40).allocate(layers).ranks == {"strong": 3, "weak": 1}


def test_a_cheap_layer_wins_over_a_strong_one_that_costs_more() -> None:
    layers = {"dear": Layer(Spectrum((2.0,)), 100), "cheap": Layer(Spectrum((1.5, 1.5)), 10)}
    assert Budget(100).allocate(layers).ranks == {"dear": 0, "cheap": 2}


def test_top_cuts_every_layer_alike_and_drops_what_is_zero() -> None:
    layers = {
        "long": Layer(Spectrum((3.0, 2.0, 1.0)), 4),
        "short": Layer(Spectrum((1.0, 0.0)), 4),
        "zero": Layer(Spectrum((0.0, 0.0)), 4),
        "kept": Layer(Spectrum((0.0, 0.0)), 4, least=1),
    }
    found = Top(2).allocate(layers)
    assert found.ranks == {"long": 2, "short": 1, "zero": 0, "kept": 1}
    assert found.error == pytest.approx(1 / math.sqrt(15))
    assert found.parameters == 16


def test_a_large_choice_is_solved_and_proved() -> None:
    """224 layers of four sizes and 64 ranks each, as an adapter of a 7B model has."""
    costs = {"q": 8192, "k": 5120, "v": 5120, "o": 8192, "gate": 18432, "up": 18432, "down": 18432}
    layers = {
        f"{block}.{name}": Layer(
            Spectrum(tuple((1 + block % 7) / (1 + i) ** (1 + j / 9) for i in range(64))), cost
        )
        for block in range(32)
        for j, (name, cost) in enumerate(costs.items())
    }
    found = Energy(0.99).allocate(layers)
    assert 1 - found.error**2 >= 0.99
    assert found.optimal
    assert found.parameters - found.bound < 18432


@pytest.mark.parametrize(
    ("make", "value"),
    [(Top, 0), (Top, 1.5), (Energy, 0.0), (Energy, 1.1), (MaxError, 1.0), (MaxError, -0.1)],
)
def test_promises_that_make_no_sense_are_refused(make: Callable[..., object], value: float) -> None:
    with pytest.raises(UserError, match="must be a"):
        make(value)


@pytest.mark.parametrize("promise", [Top(1), Energy(0.9), MaxError(0.1), Budget(10)])
def test_an_adapter_that_was_never_trained_has_no_rank(promise: Top | Budget) -> None:
    with pytest.raises(UserError, match="Every update is zero"):
        promise.allocate({"layer": Layer(Spectrum((0.0,)), 3)})
