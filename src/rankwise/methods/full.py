"""Full fine-tuning: every parameter of the base trains in place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rankwise.attaching import Plan

__all__ = ["Full"]


@dataclass(frozen=True)
class Full:
    """Train every floating-point parameter of the model. The baseline LoRA is measured against."""

    def plan(self, model: nn.Module) -> Plan:
        """Nothing is added; all parameters train."""
        names = [n for n, p in model.named_parameters() if p.dtype.is_floating_point]
        return Plan(method=self, trained=tuple(names))
