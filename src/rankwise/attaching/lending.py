"""Lent: the adapter of one model on another of the same layers, as the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from rankwise.attaching.plans import Addition, Placement, Plan
from rankwise.attaching.records import attachment, updates_of
from rankwise.layers import LoRALayer, Switch, Update

__all__ = ["Lent"]


class Lent:
    """The adapter that another model carries, attached without a copy of it.

    Both models train and read the very same A, B and trained copies, so that one model with the
    adapters of several trains all of them (:func:`using_rows`) while each stays whole by itself.

    Args:
        owner: the model that carries it, of the same layers as the one it is lent to.
        name: of the adapter there; the only one where it has one.
    """

    def __init__(self, owner: nn.Module, name: str | None = None) -> None:
        self.record = attachment(owner, name)
        self.updates = updates_of(owner, name)

    def plan(self, model: nn.Module) -> Plan:
        """What the adapter's own method plans for a model, made of what is there already."""
        plan = self.record.method.plan(model)
        return replace(
            plan,
            additions=tuple(map(self._addition, plan.additions)),
            placements=tuple(map(self._placement, plan.placements)),
        )

    def _addition(self, addition: Addition) -> Addition:
        own = self.updates[addition.name]

        def make(layer: LoRALayer, switch: Switch, made: Mapping[str, Update]) -> Update:
            addition.make(layer, switch, made)  # for what it may do to the layer
            twin = copy.copy(own)  # the same tensors; it acts when its own adapter does
            twin.switch = switch
            return twin

        return replace(addition, make=make)

    def _placement(self, placement: Placement) -> Placement:
        return replace(placement, build=lambda _: self.record.copies[placement.site.name])
