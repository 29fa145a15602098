"""The singular values of an update and what they say: its size, its ranks, what a cut costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from rankwise.errors import UserError
from rankwise.lowrank import Factors

__all__ = ["Gap", "Spectrum", "share_problems", "spectrum"]

ROUNDING = 1e-12
"""Share of the energy that is rounding, so that it adds no rank."""


@dataclass(frozen=True)
class Gap:
    """The largest step down in a row of singular values.

    Attributes:
        k: how many values stand before it.
        ratio: σ_k / σ_{k+1}.
    """

    k: int
    ratio: float


@dataclass(frozen=True)
class Spectrum:
    """The singular values σ1 ≥ σ2 ≥ ... ≥ 0 of an update. docs/math.md (23).

    Attributes:
        values: the singular values, falling.
        floor: at most this is rounding of the decomposition and counts as zero.

    Raises:
        UserError: a value is not finite, is negative, or is larger than the one before it.
    """

    values: tuple[float, ...]
    floor: float = 0.0

    def __post_init__(self) -> None:
        wrong = next((v for v in self.values if not (math.isfinite(v) and v >= 0)), None)
        if wrong is not None:
            raise UserError(f"Singular values must be finite and not negative, got {wrong!r}.")
        if any(a < b for a, b in pairwise(self.values)):
            raise UserError("Singular values must fall: give them largest first.")

    @property
    def spectral(self) -> float:
        """‖δ‖₂, the largest singular value."""
        return self.values[0] if self.values else 0.0

    @property
    def norm(self) -> float:
        """‖δ‖_F = √(Σ σi²)."""
        return self.tail(0)

    @property
    def rank(self) -> int:
        """How many singular values are more than rounding."""
        return sum(value > self.floor for value in self.values)

    @property
    def stable_rank(self) -> float:
        """‖δ‖²_F / ‖δ‖²₂, from 1 to the rank; 0 for a zero update."""
        return math.fsum(self._energies) if self.rank else 0.0

    @property
    def entropy_rank(self) -> float:
        """exp(−Σ p_i ln p_i) with p_i = σi / Σ σ, from 1 to the rank; 0 for a zero update.

        Source: Roy and Vetterli 2007, "The effective rank".
        """
        total = math.fsum(self.values)
        if not self.rank:
            return 0.0
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0))

    @property
    def gap(self) -> Gap | None:
        """The largest σ_k / σ_{k+1}; a zero stands for ``floor``. None where no step is seen.

        An update learned by a larger rank than its task has falls off behind the task's rank, in
        one step where the noise is smaller than what was learned (Ahn and Horenstein 2013). Steps
        among the last values, which together hold 0.1 % of the energy, do not count. What comes
        after the last value is not known, so r itself is never the answer.
        """
        least = max(self.floor, self.spectral * torch.finfo(torch.float64).eps)
        near = self.values[: self.holding(0.999) + 1]
        steps = [Gap(k, a / max(b, least)) for k, (a, b) in enumerate(pairwise(near), 1)]
        return max(steps, key=lambda step: step.ratio, default=None)

    def holding(self, share: float) -> int:
        """The smallest k whose k largest singular values hold ``share`` of Σ σ²; 0 for a zero
        update. 10⁻¹² of the energy is rounding and adds no rank.
        """
        if not self.rank:
            return 0
        allowed = (1 - share + ROUNDING) * self._tails[0]
        return next(k for k, left in enumerate(self._tails) if left <= allowed)

    def tail(self, k: int) -> float:
        """‖δ − δ_k‖_F = √(Σ_{i>k} σi²), the least error of any update of rank k."""
        return self.spectral * math.sqrt(self._tails[min(k, len(self.values))])

    def error(self, k: int) -> float:
        """‖δ − δ_k‖_F / ‖δ‖_F; 0 for a zero update."""
        return self.tail(k) / self.norm if self.norm else 0.0

    @cached_property
    def _energies(self) -> tuple[float, ...]:
        """(σi / σ1)², which neither overflow nor vanish."""
        top = self.spectral or 1.0
        return tuple((value / top) ** 2 for value in self.values)

    @cached_property
    def _tails(self) -> tuple[float, ...]:
        """Σ_{i>k} (σi / σ1)² for k = 0, 1, ..., added up from the smallest."""
        sums = [0.0]
        for energy in reversed(self._energies):
            sums.append(sums[-1] + energy)
        return tuple(reversed(sums))


def spectrum(factors: Factors) -> Spectrum:
    """The singular values of δ = s · (B A − B0 A0), from its small core. docs/math.md (4).

    Of a bank of E weights, whose ranks are cut together, the i-th value is √(Σ_e σ²_ei).

    Raises:
        UserError: a factor holds numbers that are not finite.
    """
    values = finite(factors).singular_values()
    whole = values if values.ndim == 1 else values.square().sum(dim=0).sqrt()
    size = max(factors.out_features, factors.in_features)
    floor = torch.finfo(torch.float64).eps * math.sqrt(size) * 4
    found = sorted((max(v, 0.0) for v in whole.tolist()), reverse=True)
    return Spectrum(tuple(found), floor * found[0] if found else 0.0)


def finite(factors: Factors) -> Factors:
    """The same factors.

    Raises:
        UserError: they hold NaN or infinity, and have no singular values.
    """
    if not (bool(torch.isfinite(factors.A).all()) and bool(torch.isfinite(factors.B).all())):
        raise UserError(
            "The update holds numbers that are not finite, so it has no singular values. Train it "
            "again with a lower learning rate, or leave it out."
        )
    return factors


def share_problems(name: str, share: float, *, zero: bool = False) -> Iterator[str]:
    """What is wrong with a share of this name: from above 0 to 1, or with ``zero`` from 0 to below
    1, as of what is lost.
    """
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not number or not (0 < share < 1 or share == (0 if zero else 1)):
        most = "at least 0 and below 1" if zero else "above 0 and at most 1"
        yield f"{name} must be a number {most}, got {share!r}."
