"""Which ranks of which layers are kept: the fewest parameters for an error, or the least error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from rankwise.errors import UserError, gather
from rankwise.lowrank import rank_problems
from rankwise.spectrum.knapsack import Group, Solution, cheapest, finest
from rankwise.spectrum.values import ROUNDING, Spectrum, share_problems

__all__ = ["Allocation", "Budget", "Energy", "Layer", "MaxError", "Promise", "Top"]


@dataclass(frozen=True)
class Layer:
    """One update among those whose ranks are chosen together.

    Attributes:
        spectrum: of the update.
        cost: parameters of one rank, in + out (times E for a bank).
        least: ranks that are kept whatever they hold.
    """

    spectrum: Spectrum
    cost: int
    least: int = 0


@dataclass(frozen=True)
class Allocation:
    """The ranks that are kept of each layer, and how good that choice is.

    Attributes:
        ranks: by layer; 0 where the whole update is dropped.
        parameters: Σ rank · cost.
        error: √(Σ tails² / Σ ‖δ‖²) over all layers together.
        bound: what no choice can be better than: parameters under Energy and MaxError, the error
            under Budget.
        optimal: whether the choice is proved to be the best.
    """

    ranks: Mapping[str, int]
    parameters: int
    error: float
    bound: float
    optimal: bool


class Promise(Protocol):
    """What a cut adapter shall keep: a frozen value."""

    def allocate(self, layers: Mapping[str, Layer]) -> Allocation:
        """The ranks of every layer.

        Raises:
            UserError: the promise cannot be kept, or every update is zero.
        """
        ...


@dataclass(frozen=True)
class Top:
    """At most rank ``r`` in every layer, by its largest singular values (Eckart-Young)."""

    r: int

    def __post_init__(self) -> None:
        gather(UserError, "Top", [*rank_problems("r", self.r)])

    def allocate(self, layers: Mapping[str, Layer]) -> Allocation:
        _something(layers)
        ranks = {
            name: max(min(self.r, layer.spectrum.rank), layer.least)
            for name, layer in layers.items()
        }
        error = _error(layers, ranks)
        return Allocation(ranks, _parameters(layers, ranks), error, error, optimal=True)


@dataclass(frozen=True)
class MaxError:
    """The fewest parameters with √(Σ ‖δ − δ_k‖² / Σ ‖δ‖²) at most ``error``. docs/math.md (25)."""

    error: float

    def __post_init__(self) -> None:
        gather(UserError, "MaxError", [*share_problems("error", self.error, zero=True)])

    def allocate(self, layers: Mapping[str, Layer]) -> Allocation:
        return _fewest(layers, self.error**2)


@dataclass(frozen=True)
class Energy:
    """The fewest parameters that hold ``share`` of Σ σ² over all layers. docs/math.md (25)."""

    share: float

    def __post_init__(self) -> None:
        gather(UserError, "Energy", [*share_problems("share", self.share)])

    def allocate(self, layers: Mapping[str, Layer]) -> Allocation:
        return _fewest(layers, 1 - self.share + ROUNDING)


@dataclass(frozen=True)
class Budget:
    """The least error with at most so many ``parameters`` in A and B. docs/math.md (25)."""

    parameters: int

    def __post_init__(self) -> None:
        p = self.parameters
        if isinstance(p, bool) or not isinstance(p, int) or p < 1:
            raise UserError(f"A budget is a whole number of parameters above 0, got {p!r}.")

    def allocate(self, layers: Mapping[str, Layer]) -> Allocation:
        _something(layers)
        least = sum(layer.least * layer.cost for layer in layers.values())
        one = least or min(layer.cost for layer in layers.values() if layer.spectrum.rank)
        if self.parameters < one:
            raise UserError(
                f"A budget of {self.parameters:,} parameters holds no adapter: the smallest has "
                f"{one:,}. Give at least that."
            )
        groups, top = _groups(layers)
        made = _allocation(layers, groups, finest(groups, self.parameters - least))
        return replace(made, bound=math.sqrt(max(made.bound, 0.0)) * top / _norm(layers))


def _fewest(layers: Mapping[str, Layer], share: float) -> Allocation:
    """The fewest parameters that lose at most ``share`` of the energy."""
    _something(layers)
    groups, top = _groups(layers)
    allowed = share * (_norm(layers) / top) ** 2
    made = _allocation(layers, groups, cheapest(groups, allowed))
    least = sum(layer.least * layer.cost for layer in layers.values())
    return replace(made, bound=made.bound + least)


def _groups(layers: Mapping[str, Layer]) -> tuple[list[Group], float]:
    """The ranks to choose from by their cost, each with its σ² over that of the largest of all."""
    top = max(layer.spectrum.spectral for layer in layers.values())
    items: dict[int, list[tuple[float, str]]] = {}
    for name, layer in layers.items():
        live = layer.spectrum.values[layer.least : layer.spectrum.rank]
        items.setdefault(layer.cost, []).extend(((v / top) ** 2, name) for v in live)
    ordered = {cost: sorted(own, key=lambda it: -it[0]) for cost, own in items.items() if own}
    return [
        Group(cost, tuple(e for e, _ in own), tuple(name for _, name in own))
        for cost, own in sorted(ordered.items())
    ], top


def _allocation(layers: Mapping[str, Layer], groups: list[Group], found: Solution) -> Allocation:
    ranks = {name: layer.least for name, layer in layers.items()}
    for group, taken in zip(groups, found.taken, strict=True):
        for name in group.names[:taken]:
            ranks[name] += 1
    error = _error(layers, ranks)
    return Allocation(ranks, _parameters(layers, ranks), error, found.bound, found.optimal)


def _parameters(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> int:
    return sum(ranks[name] * layer.cost for name, layer in layers.items())


def _norm(layers: Mapping[str, Layer]) -> float:
    return math.hypot(*(layer.spectrum.norm for layer in layers.values()))


def _error(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> float:
    tails = (layer.spectrum.tail(ranks[name]) for name, layer in layers.items())
    return math.hypot(*tails) / _norm(layers)


def _something(layers: Mapping[str, Layer]) -> None:
    if not any(layer.spectrum.rank for layer in layers.values()):
        raise UserError(
            "Every update is zero, as before training, so there is no rank to choose. Name an "
            "adapter that was trained."
        )
