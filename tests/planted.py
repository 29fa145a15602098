"""Linear tasks with a planted answer: a frozen layer whose target differs by a known rank."""

from __future__ import annotations

import torch
from torch import Tensor

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


def learned(x: Tensor, y: Tensor, r: int = R) -> tuple[Tensor, Tensor]:
    """A (E, r, IN) and B (E, OUT, r) trained by Adam from LoRA's start, for E tasks at once."""
    draw = torch.Generator().manual_seed(0)
    A = torch.nn.Parameter(torch.randn(len(x), r, IN, generator=draw) / IN**0.5)
    B = torch.nn.Parameter(torch.zeros(len(x), OUT, r))
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
