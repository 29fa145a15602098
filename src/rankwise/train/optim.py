"""AdamW over what trains, and the learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["adamw", "learning_rate", "set_rate"]


def adamw(parameters: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) in one fused step.

    Vectors (biases, normalisation weights) do not decay, as is usual; matrices do.
    """
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, fused=True)


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
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
