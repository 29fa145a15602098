"""Tasks with a planted answer: what gradients learn by too large a rank shows the rank there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.lowrank import Factors
from rankwise.spectrum import spectrum

SEEDS, RANKS = range(20), range(1, 17)
OUT, IN, ROWS, R, STEPS = 22, 24, 256, 18, 100


def planted(k: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Inputs x (ROWS, IN), and what the frozen network lacks of its target's outputs on them.

    The target differs from the network by a matrix of rank k whose singular values lie between 1
    and 2; the noise is added to the outputs.
    """
    draw = torch.Generator().manual_seed(1000 * k + seed)
    left = torch.linalg.qr(torch.randn(OUT, k, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(IN, k, generator=draw)).Q
    delta = left * (1 + torch.rand(k, generator=draw)) @ right.T
    x = torch.randn(ROWS, IN, generator=draw)
    return x, x @ delta.T + noise * torch.randn(ROWS, OUT, generator=draw)


def learned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A (E, R, IN) and B (E, OUT, R) trained by Adam from LoRA's start, for E tasks at once."""
    draw = torch.Generator().manual_seed(0)
    A = torch.nn.Parameter(torch.randn(len(x), R, IN, generator=draw) / IN**0.5)
    B = torch.nn.Parameter(torch.zeros(len(x), OUT, R))
    optimizer = torch.optim.Adam([A, B], lr=0.06)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    xx, yx = x.mT @ x / ROWS, y.mT @ x / ROWS
    for _ in range(STEPS):
        delta = B @ A
        loss = (delta @ xx * delta).sum() - 2 * (delta * yx).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()
    return A.detach(), B.detach()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_gap_of_what_was_learned_is_at_the_planted_rank(noise: float) -> None:
    tasks = [(k, seed) for k in RANKS for seed in SEEDS]
    made = [planted(k, seed, noise) for k, seed in tasks]
    A, B = learned(*(torch.stack(parts) for parts in zip(*made, strict=True)))
    wrong: list[tuple[int, int, int]] = []
    for (k, seed), a, b in zip(tasks, A, B, strict=True):
        gap = spectrum(Factors(a, b, 1.0)).gap
        assert gap is not None
        if gap.k != k:
            wrong.append((k, seed, gap.k))
    assert wrong == []
