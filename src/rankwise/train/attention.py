"""Attention by plain products where they are faster than torch's fused kernel: on short rows."""

from __future__ import annotations

import contextlib
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["attending", "products_up_to"]

_LENGTHS = (32, 64, 128, 256)  # tokens; the matrices of weights that longer rows need are large
_ROWS = 4  # of a batch that is measured
_ROUNDS = 4
_WORTH = 0.9  # the products are taken when they need at most so much of the fused kernel's time


def attending(longest: int, length: int) -> contextlib.AbstractContextManager[object]:
    """For a forward and backward pass of rows of this length: by products if it is no longer.

    Only functional.scaled_dot_product_attention looks at it; gradient checkpointing calls that in
    backward, too. It holds for the whole process: passes in other threads are computed so as well.
    """
    return sdpa_kernel([SDPBackend.MATH]) if length <= longest else contextlib.nullcontext()


def products_up_to(model: nn.Module, longest: int) -> int:
    """Up to which length attention is faster by products here; 0 where it never is.

    torch's fused kernel for a CPU has a slow backward for bfloat16 and float16 on short rows. In
    float32 it is slower on the shortest alone, by little of a step (docs/speed.md), so that nothing
    is measured there. The gradient is timed with it where something trains below the head. The
    heads are those that the model's config tells of; where it tells none, or of another function
    for attention, the answer is 0.
    """
    dtype, config = getattr(model, "dtype", torch.float32), getattr(model, "config", None)
    heads, width = (getattr(config, n, None) for n in ("num_attention_heads", "hidden_size"))
    fused = getattr(config, "_attn_implementation", None) == "sdpa"
    if not fused or dtype.itemsize != 2 or not isinstance(heads, int) or not isinstance(width, int):
        return 0
    body = getattr(model, "base_model", model)
    trains = any(p.requires_grad for p in body.parameters())
    found = 0
    for length in _LENGTHS:
        if found >= longest or not _faster(length, heads, width // heads, dtype, trains):
            break
        found = length
    return found


def _faster(length: int, heads: int, width: int, dtype: torch.dtype, trains: bool) -> bool:
    """Whether the products take less time, where it trains with the gradient; of some rounds."""
    shape = _ROWS, length, heads, width  # as a linear layer gives them
    q, k, v, dy = (torch.ones(shape, dtype=dtype).transpose(1, 2) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_(trains)
    mask = torch.ones(_ROWS, 1, length, length, dtype=torch.bool)
    best = [float("inf"), float("inf")]
    for _ in range(_ROUNDS):
        for i, longest in enumerate((length, 0)):
            start = time.perf_counter()
            with attending(longest, length):
                made = F.scaled_dot_product_attention(q, k, v, mask)
                if trains:
                    made.backward(dy)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] <= _WORTH * best[1]
