"""AdamW over what trains, and the learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["adamw", "learning_rate", "set_rate"]


def adamw(groups: Iterable[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) in one fused step.

    The groups are those of :func:`rankwise.parameter_groups`.
    """
    return torch.optim.AdamW(list(groups), fused=True)


def learning_rate(step: int, total: int, highest: float, warmup: float) -> float:
    """The rate of optimiser step ``step`` (from 0) of ``total``.

    It rises linearly over the first ⌈warmup · total⌉ steps, then falls linearly and would be zero
    at step ``total``.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return highest * (step + 1) / rising
    return highest * (total - step) / max(1, total - rising)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate from the next step on, times each group's ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
