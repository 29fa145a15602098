"""The dropout of a branch: backward draws its mask again from a seed, in place of keeping it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw", "dropped", "gain", "new_seed"]

_BY_SEED = {"cpu", "cuda", "xpu"}  # devices with a torch.Generator that draws by itself
_STEPS = 1 << 16


def new_seed(device: torch.device) -> int | None:
    """A seed for one mask, or None where the mask itself is to be kept.

    It comes from torch's generator for the CPU, so no device is waited for, and what governs that
    generator governs the mask: torch.manual_seed, and checkpointing. A CUDA graph, which would
    replay one seed, and devices that are not known to draw from a generator of their own keep it.
    """
    if device.type not in _BY_SEED:
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    drawn = torch.randint(2**63 - 1, (), device="cpu")
    return int(drawn) if type(drawn) is Tensor else 0  # where tensors have no data


def draw(shape: Sequence[int], device: torch.device, dropout: float, seed: int | None) -> Tensor:
    """Which numbers of (N, in) stay: each with probability 1 − p, to 2⁻¹⁶, as a tensor of bools.

    With a seed it is the same mask each time; without, torch's own generator draws it. On a CPU a
    number costs 16 random bits and a comparison: ``bernoulli_`` draws and divides for each one, and
    takes as long there as a product with a small weight.
    """
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    if device.type != "cpu":
        mask = torch.empty(shape, dtype=torch.bool, device=device)
        return mask.bernoulli_(_steps(dropout) / _STEPS, generator=generator)
    count = torch.Size(shape).numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return (words.view(torch.int16)[:count] < _steps(dropout) - _STEPS // 2).view(shape)


def dropped(rows: Tensor, mask: Tensor) -> Tensor:
    """rows where the mask is true and zero elsewhere, to be multiplied with the :func:`gain`."""
    return torch.where(mask, rows, 0)


def gain(dropout: float) -> float:
    """One over the probability to stay; it keeps the mean."""
    return _STEPS / _steps(dropout)


def _steps(dropout: float) -> int:
    return min(max(round(_STEPS * (1.0 - dropout)), 1), _STEPS - 1)
