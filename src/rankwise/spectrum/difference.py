"""The nearest low-rank update to a dense change of a weight, and how far from it that stays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import UserError
from rankwise.inits.spectral import leading
from rankwise.lowrank import Factors

__all__ = ["Nearest", "chance_held", "nearest", "rounding_norm"]

EXACT = 1024
"""The smaller side up to which a change is decomposed exactly."""
_SLAB = 1 << 22  # numbers of a dense matrix in float64 at a time
_ITERATIONS = 2


@dataclass(frozen=True, eq=False)
class Nearest:
    """A change Δ of a weight and the update found for it.

    Attributes:
        factors: δ of rank k with scale 1, in float32.
        norm: ‖Δ‖_F.
        lost: ‖Δ − δ‖_F, measured on the factors as they are.
        exact: whether the decomposition was exact, so that no update of rank k is nearer but for
            rounding; a randomised one is nearly as near.
    """

    factors: Factors
    norm: float
    lost: float
    exact: bool

    @property
    def held(self) -> float:
        """The share of ‖Δ‖² that δ holds: 1 − ‖Δ − δ‖² / ‖Δ‖²."""
        return 1 - (self.lost / self.norm) ** 2 if self.norm else 1.0


def nearest(
    delta: Tensor,
    *,
    r: int | None = None,
    energy: float | None = None,
    generator: torch.Generator | None = None,
) -> Nearest:
    """The update of rank ``r``, or of the smallest rank that holds ``energy`` of ‖Δ‖², at most r.

    Up to a smaller side of 1024 by the singular value decomposition, else by random projection with
    two power iterations (docs/math.md (11)), of twice as many directions until they hold enough.
    ‖Δ − δ‖ is measured either way, a few rows at a time, in float64. docs/math.md (26).

    Args:
        delta: Δ (out, in), finite.
        r: the rank, or the most there may be beside ``energy``.
        energy: the share of ‖Δ‖² to hold.
        generator: of the random projections.

    Raises:
        UserError: neither is given, a value makes no sense, or Δ is not finite.
    """
    _check(r, energy)
    if not bool(torch.isfinite(delta).all()):
        raise UserError("The change of a weight holds numbers that are not finite.")
    most = min(*delta.shape, r or max(delta.shape))
    norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    exact = min(delta.shape) <= EXACT
    wide = delta.double() if exact else delta.float()
    width = most if exact or energy is None else min(most, 32)
    while True:
        u, sigma, vh = leading(wide, width, None if exact else _ITERATIONS, generator)
        k = width if energy is None else _enough(sigma, energy * norm**2)
        if k < width or width == most:
            break
        width = min(most, 2 * width)
    root = sigma[:k].sqrt()
    A, B = (root[:, None] * vh[:k]).float(), (u[:, :k] * root).float()
    factors = Factors(A.contiguous(), B.contiguous(), 1.0)
    return Nearest(factors, norm, _distance(delta, factors), exact)


def chance_held(out_features: int, in_features: int, k: int) -> float:
    """The share of ‖Δ‖² that rank k holds of a change without structure (independent entries).

    Formula: at most k (√out + √in)² / (out · in), the largest singular value of such a matrix being
    near √out + √in (Marchenko and Pastur 1967). A change that is held better is of low rank.
    """
    top = (math.sqrt(out_features) + math.sqrt(in_features)) ** 2
    return min(1.0, k * top / (out_features * in_features))


def rounding_norm(weight: Tensor) -> float:
    """‖·‖_F of the rounding that a weight in 16 bits carries, √(Σ u² / 12), u the last digit of
    each entry; 0 for longer formats.

    Where ‖Δ‖ is no larger than this, what looks like a change is the rounding of the checkpoint.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    eps = torch.finfo(weight.dtype).eps
    _, exponent = torch.frexp(weight.float())
    units = torch.ldexp(torch.full_like(exponent, eps, dtype=torch.float32), exponent - 1)
    units[weight == 0] = 0
    return float(torch.linalg.vector_norm(units, dtype=torch.float64)) / math.sqrt(12)


def _enough(sigma: Tensor, wanted: float) -> int:
    """How many values hold so much energy; all of them where even these do not."""
    held = sigma.double().square().cumsum(0)
    return min(int((held < wanted * (1 - 1e-12)).sum()) + 1, len(sigma))


def _distance(delta: Tensor, factors: Factors) -> float:
    """‖Δ − B A‖_F, a slab of rows at a time, in float64."""
    A = factors.A.double()
    rows = max(1, _SLAB // delta.shape[1])
    parts = zip(delta.split(rows), factors.B.split(rows), strict=True)
    return math.hypot(*(float((d.double() - b.double() @ A).norm()) for d, b in parts))


def _check(r: int | None, energy: float | None) -> None:
    if r is None and energy is None:
        raise UserError("Say which rank, or how much of the change to hold: r or energy.")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise UserError(f"r must be a whole number of 1 or more, got {r!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy must be a number above 0 and at most 1, got {energy!r}.")
