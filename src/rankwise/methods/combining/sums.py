"""Weighted sums of low-rank updates, exact or cut to a rank, without a dense matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch

from rankwise.errors import UserError, gather
from rankwise.lowrank import Factors, rank_problems
from rankwise.spectrum import share_problems

__all__ = ["SVD", "Combination", "Concatenate", "Distance", "Joined", "common_dtype", "distance"]


@dataclass(frozen=True)
class Distance:
    """How far an update is from the one that was wanted, in Frobenius norms.

    Attributes:
        wanted: ‖T‖, T (out, in) being the update that was wanted.
        lost: ‖T − δ‖, measured on the factors as they are, rounding included.
    """

    wanted: float
    lost: float

    @property
    def error(self) -> float:
        """‖T − δ‖ / ‖T‖; 0 where both are 0."""
        if self.wanted == 0:
            return 0.0 if self.lost == 0 else math.inf
        return self.lost / self.wanted

    @staticmethod
    def over(distances: Iterable[Distance]) -> Distance:
        """Many weights as one: the roots of the sums of squares."""
        each = list(distances)
        return Distance(math.hypot(*(d.wanted for d in each)), math.hypot(*(d.lost for d in each)))


@dataclass(frozen=True)
class Joined:
    """Several updates of one weight as one.

    Attributes:
        factors: the update δ, with scale 1.
        cut: from what the combination means, at its full rank, to δ.
        shift: from the plain sum of the weighted updates to δ.
    """

    factors: Factors
    cut: Distance
    shift: Distance


class Combination(Protocol):
    """How the updates of one weight become one: a frozen value."""

    def join(self, parts: Sequence[Factors], name: str) -> Joined:
        """One update from the updates w_i δ_i of the weight called ``name``.

        ``parts`` are one or more, have one shape, no start, and w_i multiplied into their scale.
        """
        ...


@dataclass(frozen=True)
class Concatenate:
    """The sum itself: A = [A_1; A_2; ...], B = [w_1 s_1 B_1, w_2 s_2 B_2, ...], of rank Σ r_i.

    Exact but for one rounding of each entry of B. A rank above min(out, in) says nothing new
    and is cut to it, which changes δ by rounding alone. docs/math.md (1).
    """

    def join(self, parts: Sequence[Factors], name: str) -> Joined:
        total = _stack(parts)
        fits = total.r <= min(total.out_features, total.in_features)
        return _measured(total, total if fits else total.truncate(_most(total)), parts)


@dataclass(frozen=True)
class SVD:
    """The best approximation of the sum Σ w_i δ_i by an update of lower rank (Eckart-Young).

    Two thin QR factorisations of the stacked factors and the SVD of their small core: with
    R = Σ r_i it costs O((out + in) R²), and no (out, in) matrix is formed. docs/math.md (4), (5).

    Attributes:
        r: the rank, cut where the sum has less; None is no limit beside ``energy``.
        energy: the share of Σ σ² to keep, above 0 and at most 1, by the fewest singular values
            that hold it (over all weights of a bank together). The error is then at most
            √(1 − energy) as long as ``r`` does not cut deeper.

    With neither, the rank is the largest among the updates.

    Raises:
        UserError: a value makes no sense.
    """

    r: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        problems = [*rank_problems("r", self.r, optional=True)]
        if self.energy is not None:
            problems.extend(share_problems("energy", self.energy))
        gather(UserError, "SVD", problems)

    def join(self, parts: Sequence[Factors], name: str) -> Joined:
        total = _stack(parts)
        whole = total.truncate(_most(total))
        k = self._rank(whole, parts)
        return _measured(total, Factors(whole.A[..., :k, :], whole.B[..., :k], 1.0), parts)

    def _rank(self, whole: Factors, parts: Sequence[Factors]) -> int:
        """How many singular values to keep; those of ``whole`` are its columns' squared norms."""
        limit = whole.r if self.r is None else min(self.r, whole.r)
        if self.energy is None:
            return limit if self.r is not None else min(limit, widest(parts))
        energies = whole.B.square().sum(dim=-2).square().reshape(-1, whole.r).sum(dim=0)
        held = energies.cumsum(0)
        enough = held >= (self.energy - 1e-12) * held[-1]  # rounding adds no rank
        return min(limit, int(enough.int().argmax()) + 1)


def widest(parts: Sequence[Factors]) -> int:
    """The largest rank among the updates."""
    return max(part.r for part in parts)


def common_dtype(parts: Sequence[Factors]) -> torch.dtype:
    """The dtype that holds every factor without rounding, float32 at least."""
    every = (t.dtype for part in parts for t in (part.A, part.B))
    return reduce(torch.promote_types, every, torch.float32)


def distance(parts: Sequence[Factors], delta: Factors) -> Distance:
    """From the plain sum of the parts to δ, without a dense matrix."""
    return _away(_stack(parts), delta)


def _stack(parts: Sequence[Factors]) -> Factors:
    """The sum of the parts with scale 1, in float64 on the first one's device."""
    where = parts[0].A.device
    down = [part.A.detach().to(where, torch.float64) for part in parts]
    up = [part.B.detach().to(where, torch.float64) * part.scale for part in parts]
    return Factors(torch.cat(down, dim=-2), torch.cat(up, dim=-1), 1.0)


def _most(factors: Factors) -> int:
    return min(factors.r, factors.out_features, factors.in_features)


def _away(total: Factors, delta: Factors) -> Distance:
    rest = _stack((total, Factors(delta.A, delta.B, -delta.scale)))
    return Distance(_norm(total), _norm(rest))


def _norm(factors: Factors) -> float:
    """‖δ‖, which is that of the core. docs/math.md (4)."""
    return float(factors.core()[1].norm())


def _measured(total: Factors, short: Factors, parts: Sequence[Factors]) -> Joined:
    dtype = common_dtype(parts)
    factors = Factors(short.A.to(dtype).contiguous(), short.B.to(dtype).contiguous(), 1.0)
    away = _away(total, factors)
    return Joined(factors, away, away)
