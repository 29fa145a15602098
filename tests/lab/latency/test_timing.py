"""Which passes are timed, and in which order; never how long they took."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rankwise.lab.latency.timing import time_passes

INPUTS = {"input_ids": torch.ones(3, 7, dtype=torch.int64)}


class Noted(nn.Module):
    """Notes its calls."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, input_ids: Any) -> Any:
        assert not torch.is_grad_enabled()
        self.calls.append(self.name)
        return input_ids


def test_every_round_has_every_model_once_in_an_order_of_its_own() -> None:
    calls: list[str] = []
    names = ["a", "b", "c", "d"]
    models = {name: Noted(name, calls) for name in names}
    done: list[None] = []
    found = time_passes(models, INPUTS, 12, 0, lambda: done.append(None))
    assert [(t.variant, t.batch, t.length, len(t.seconds)) for t in found] == [
        (name, 3, 7, 12) for name in names
    ]
    assert all(second > 0 for t in found for second in t.seconds)
    assert len(done) == 48
    assert calls[:8] == ["a", "a", "b", "b", "c", "c", "d", "d"]  # not timed
    timed = calls[8:]
    repeats, rest = divmod(len(timed), 48)
    assert rest == 0
    order = timed[::repeats]
    rounds = [order[i : i + 4] for i in range(0, 48, 4)]
    assert all(sorted(each) == names for each in rounds)
    assert len({tuple(each) for each in rounds}) > 3


def test_the_order_follows_from_the_seed() -> None:
    def order(seed: int) -> list[str]:
        calls: list[str] = []
        models = {name: Noted(name, calls) for name in "abcd"}
        time_passes(models, INPUTS, 6, seed, lambda: None)
        timed = calls[8:]
        return timed[:: len(timed) // 24]

    assert order(1) == order(1) != order(2)
