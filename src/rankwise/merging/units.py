"""What rounding may do in a dtype: the unit roundoff u, γ_k and the smallest number η."""

from __future__ import annotations

import math

import torch

__all__ = ["gamma", "roundoff", "smallest"]


def roundoff(dtype: torch.dtype) -> float:
    """u, the unit roundoff of rounding to nearest: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def gamma(k: int, u: float) -> float:
    """γ_k = k u / (1 - k u), the bound on k roundings one after another.

    Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition 2002, lemma 3.1. It holds
    for a sum of k products in any order.
    """
    return k * u / (1 - k * u) if k * u < 1 else math.inf


def smallest(dtype: torch.dtype) -> float:
    """η: the error of a result too small for the dtype's full precision.

    The smallest subnormal in float16; elsewhere the smallest normal number, as a processor may
    flush what lies below to zero.
    """
    numbers = torch.finfo(dtype)
    return numbers.smallest_normal * (numbers.eps if dtype is torch.float16 else 1)
