"""What a method will do to a model, as values: additions, trained copies, and the plan of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from rankwise.layers import LoRALayer, Switch, Update
from rankwise.targets import Site

__all__ = ["Addition", "Method", "Placement", "Plan"]


@dataclass(frozen=True)
class Addition:
    """One update to be put beside a frozen module.

    Attributes:
        site: the module.
        parameter: the name there of the parameter that it changes, or None where it changes what
            the module does and no parameter of it.
        name: the name of what is adapted: the module's, and behind it the part's or parameter's.
        make: builds the update for the layer at the site, the adapter's switch, and the updates
            that were made before it, by name.
        label: tells several updates of one layer apart; empty where there is one.
    """

    site: Site
    parameter: str | None
    name: str
    make: Callable[[LoRALayer, Switch, Mapping[str, Update]], Update]
    label: str = ""


@dataclass(frozen=True)
class Placement:
    """A copy of a module that trains as a whole, to hang in the module's place.

    Attributes:
        site: where.
        build: makes the copy from the base's own module, which is frozen and kept.
    """

    site: Site
    build: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Plan:
    """What a method will do to a model, decided before anything is touched.

    Attributes:
        method: the value that asked for it.
        additions: updates to put beside frozen parameters.
        placements: trained copies to put in.
        trained: names of the base's own parameters that train in place (full fine-tuning).
        notes: what the user should be told, one sentence each.
    """

    method: Method
    additions: tuple[Addition, ...] = ()
    placements: tuple[Placement, ...] = ()
    trained: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Method(Protocol):
    """What may train: a frozen value that makes a :class:`Plan` for a model."""

    def plan(self, model: nn.Module) -> Plan: ...
