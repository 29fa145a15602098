"""Dropout by seed: backward draws a mask again in place of keeping it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["draw", "dropped", "gain", "new_seed"]

_BY_SEED = {"cpu", "cuda", "xpu"}  # devices with a torch.Generator that draws by itself
_STEPS = 1 << 16
_BLOCK = 1 << 18  # numbers of a mask at a time, whose words caches hold
_FEW = 1 << 14  # numbers of a mask for which Python's generator is faster than the calls of a hash
_ROUNDS = ((16, 0x21F0AAAD), (15, 0xD35A2D97), (15, 0x31848BAB))  # shift, and odd multiplier


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


def draw(
    shape: Sequence[int],
    device: torch.device,
    dropout: float,
    seed: int | None,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """Which numbers of (N, in) stay: each with probability 1 − p, to 2⁻¹⁶, as ones and zeros.

    With a seed it is the same mask each time, for any number of threads; without, torch's own
    generator draws it. On a CPU that takes as long as a product with a small weight: a mask is made
    there of 16 bits for each number, which Python's generator draws where they are few, and which
    otherwise are the numbers' places hashed with the seed, by all threads at once.
    """
    mask = torch.empty(shape, dtype=dtype, device=device)
    if device.type != "cpu" or seed is None or type(mask) is not Tensor:  # which has no numbers
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        return mask.bernoulli_(_steps(dropout) / _STEPS, generator=generator)
    bound, flat = _steps(dropout) - _STEPS // 2, mask.view(-1)
    if len(flat) <= _FEW:
        drawn = bytearray(random.Random(seed).randbytes(2 * len(flat)))
        if drawn:
            torch.lt(torch.frombuffer(drawn, dtype=torch.int16), bound, out=flat)
        return mask
    seed = _mixed(seed)
    for number, part in enumerate(flat.split(_BLOCK)):
        halves = _words((len(part) + 1) // 2, _mixed(seed + number)).view(torch.int16)
        torch.lt(halves[: len(part)], bound, out=part)
    return mask


def gain(dropout: float) -> float:
    """One over the probability to stay; it keeps the mean."""
    return _STEPS / _steps(dropout)


def dropped(x: Tensor, p: float) -> Tensor:
    """x with each number zero with probability p, to 2⁻¹⁶, and the others times the gain.

    What ``torch.nn.functional.dropout`` does, with other draws; for backward a seed is kept.
    """
    seed = new_seed(x.device)
    if seed is None:
        return torch.nn.functional.dropout(x, p)
    return _Dropout.apply(x, p, seed)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return x * _scaled(x, p, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        return dy * _scaled(dy, ctx.p, ctx.seed), None, None


def _scaled(x: Tensor, p: float, seed: int) -> Tensor:
    return draw(x.shape, x.device, p, seed, x.dtype).mul_(gain(p))


def _steps(dropout: float) -> int:
    return min(max(round(_STEPS * (1.0 - dropout)), 1), _STEPS - 1)


def _words(count: int, seed: int) -> Tensor:
    """So many random words of 32 bits: 0, 1, 2, ... hashed with the two halves of the seed.

    Rounds of x ← (x ⊕ (x ≫ k)) · m mod 2³², each of which permutes the words: the finaliser of a
    hash table, with multipliers that C. Wellons and others found by search (nullprogram.com,
    "Prospecting for Hash Functions").
    """
    words = torch.arange(count, dtype=torch.int32)
    room = torch.empty_like(words)
    keys = (_signed(seed), _signed(seed >> 32), 0)
    for key, (shift, factor) in zip(keys, _ROUNDS, strict=True):
        _fold(words.bitwise_xor_(key), shift, room).mul_(_signed(factor))
    return _fold(words, 14, room)


def _mixed(seed: int) -> int:
    """The seed permuted, so that near ones have nothing in common: SplitMix64's finaliser."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        seed = (seed ^ (seed >> shift)) * factor % (1 << 64)
    return seed ^ (seed >> 31)


def _fold(words: Tensor, shift: int, room: Tensor) -> Tensor:
    """words ⊕ (words ≫ shift) in place; torch's own shift carries the sign along."""
    torch.bitwise_right_shift(words, shift, out=room).bitwise_and_((1 << (32 - shift)) - 1)
    return words.bitwise_xor_(room)


def _signed(word: int) -> int:
    """The low 32 bits as a signed number."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
