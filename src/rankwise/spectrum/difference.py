"""The nearest low-rank update to a dense change of a weight, and how far from it that stays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import UserError, gather
from rankwise.inits.spectral import leading, live
from rankwise.lowrank import Factors, rank_problems
from rankwise.spectrum.values import share_problems

__all__ = ["Nearest", "chance_held", "frobenius", "nearest", "rounding_norm", "subtract"]

EXACT = 1024
"""The smaller side up to which a change is decomposed exactly."""
_SLAB = 1 << 22  # numbers of a dense matrix that are widened at a time
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

    Up to a smaller side of 1024, or for half of all ranks, by the singular value decomposition,
    else by random projection with two power iterations (docs/math.md (11)), of twice as many
    directions until they hold enough. ‖Δ − δ‖ is measured either way. No second copy of a large Δ
    is made: what is computed in float64 takes a few rows at a time. docs/math.md (26).

    Args:
        delta: Δ (out, in), finite.
        r: the rank, or the most there may be beside ``energy``.
        energy: the share of ‖Δ‖² to hold.
        generator: of the random projections.

    Raises:
        UserError: neither is given, a value makes no sense, or Δ is not finite.
    """
    _check(r, energy)
    norm = frobenius(delta)
    if not math.isfinite(norm):
        raise UserError("The change of a weight holds numbers that are not finite.")
    least = min(delta.shape)
    most = min(least, r or least)
    wanted = None if energy is None else energy * norm**2
    width = most if wanted is None else min(most, 32)
    while least > EXACT and 2 * width < least:
        u, sigma, vh = leading(delta.float(), width, _ITERATIONS, generator)
        k = width if wanted is None else _enough(sigma, wanted)
        if k < width or width == most:
            root = sigma[:k].sqrt()
            factors = _balanced(root[:, None] * vh[:k], u[:, :k] * root)
            return Nearest(factors, norm, _distance(delta, factors), exact=False)
        width = min(most, 2 * width)
    factors = _balanced(*_exactly(delta, most, wanted))
    return Nearest(factors, norm, _distance(delta, factors), exact=True)


def subtract(tuned: Tensor, base: Tensor) -> Tensor:
    """Δ = W − W0 in float32 at least, with no copy of W0 beside it."""
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    delta = tuned.to(wide, copy=True)
    for part, other in zip(_slabs(delta), _slabs(base), strict=True):
        part.sub_(other)
    return delta


def frobenius(tensor: Tensor) -> float:
    """‖·‖_F in float64, a few rows at a time; not finite where a number is not."""
    return math.hypot(
        *(float(torch.linalg.vector_norm(s, dtype=torch.float64)) for s in _slabs(tensor))
    )


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
    return math.hypot(*(float(_last_digits(s).norm()) for s in _slabs(weight))) / math.sqrt(12)


def _last_digits(weight: Tensor) -> Tensor:
    """u of each entry, in float64: what its last binary digit is worth; 0 of a zero."""
    _, exponent = torch.frexp(weight.float())
    eps = torch.full_like(exponent, torch.finfo(weight.dtype).eps, dtype=torch.float64)
    return torch.ldexp(eps, exponent - 1).masked_fill_(weight == 0, 0)


def _slabs(tensor: Tensor, least: int = 1) -> tuple[Tensor, ...]:
    """A few rows at a time, ``least`` at least."""
    return tensor.split(max(least, _SLAB // max(1, tensor.shape[1:].numel())))


def _exactly(delta: Tensor, most: int, wanted: float | None) -> tuple[Tensor, Tensor]:
    """√Σ Vᵀ and U √Σ = Δ V / √Σ of the leading triples, in float64.

    Δ has the σ and V of the small triangle R of Δ = Q R, found by stacking a few rows of Δ under
    the triangle of those before; Q is not needed. docs/math.md (26).
    """
    if delta.shape[0] < delta.shape[1]:
        B, A = _exactly(delta.mT, most, wanted)
        return A.mT, B.mT
    triangle = torch.zeros(0, delta.shape[1], dtype=torch.float64, device=delta.device)
    for slab in _slabs(delta, delta.shape[1]):
        triangle = torch.linalg.qr(torch.cat([triangle, slab.double()]), mode="r").R
    _, sigma, vh = leading(triangle, most, None)
    k = most if wanted is None else _enough(sigma, wanted)
    root = torch.where(live(sigma, max(delta.shape)), sigma, 0).sqrt()[:k]
    right = torch.where(root > 0, vh[:k].mT / root, 0)
    B = torch.cat([(slab.double() @ right).float() for slab in _slabs(delta)])
    return root[:, None] * vh[:k], B


def _balanced(A: Tensor, B: Tensor) -> Factors:
    return Factors(A.float().contiguous(), B.float().contiguous(), 1.0)


def _enough(sigma: Tensor, wanted: float) -> int:
    """How many values hold so much energy; all of them where even these do not."""
    held = sigma.double().square().cumsum(0)
    return min(int((held < wanted * (1 - 1e-12)).sum()) + 1, len(sigma))


def _distance(delta: Tensor, factors: Factors) -> float:
    """‖Δ − B A‖_F, a slab of rows at a time, in float64."""
    A = factors.A.double()
    deltas = _slabs(delta)
    parts = zip(deltas, factors.B.split(len(deltas[0])), strict=True)
    return math.hypot(*(float((d.double() - b.double() @ A).norm()) for d, b in parts))


def _check(r: int | None, energy: float | None) -> None:
    if r is None and energy is None:
        raise UserError("Say which rank, or how much of the change to hold: r or energy.")
    problems = [*rank_problems("r", r, optional=True)]
    if energy is not None:
        problems.extend(share_problems("energy", energy))
    gather(UserError, "The nearest update", problems)
