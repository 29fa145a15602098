"""Forward passes timed in turn, so that what slows the machine slows every variant alike."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rankwise.lab.latency.records import Timing

__all__ = ["time_passes"]

_LEAST = 0.01
"""Seconds that one measurement takes at least: short passes are repeated in it."""


def time_passes(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    rounds: int,
    seed: int,
    done: Callable[[], None],
) -> list[Timing]:
    """Time a forward pass of each model ``rounds`` times, in a new order in each round.

    Before that each runs twice without being timed. ``done`` is called after each measurement.
    """
    batch, length = inputs["input_ids"].shape
    with torch.no_grad():
        warm = {
            name: min(_seconds(model, inputs, 1) for _ in range(2))
            for name, model in models.items()
        }
        repeats = math.ceil(_LEAST / max(min(warm.values()), 1e-9))
        found: dict[str, list[float]] = {name: [] for name in models}
        draw = random.Random(seed)
        for _ in range(rounds):
            for name in draw.sample(list(models), len(models)):
                found[name].append(_seconds(models[name], inputs, repeats))
                done()
    return [Timing(name, batch, length, tuple(values)) for name, values in found.items()]


def _seconds(model: nn.Module, inputs: Mapping[str, Tensor], repeats: int) -> float:
    """The mean time of a pass over some of them, the device's work among it."""
    device = inputs["input_ids"].device
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        model(**inputs)
    _wait(device)
    return (time.perf_counter() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
