"""THE formula: δ = s · B A, its factors, size, singular values and truncation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import UserError

__all__ = ["Factors", "count", "scaling"]


def scaling(r: int, alpha: float, rank_stabilized: bool = False) -> float:
    """The factor s in front of B A.

    Formula: s = α / r (Hu et al. 2021, arXiv 2106.09685, section 4.1), or s = α / √r when
    ``rank_stabilized`` (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2). docs/math.md (2).

    Raises:
        UserError: r is not a positive integer, or α is not a finite positive number.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise UserError(f"r must be a whole number of 1 or more, got {r!r}.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UserError(f"alpha must be a number, got {alpha!r}.")
    if not math.isfinite(alpha) or alpha <= 0:
        raise UserError(f"alpha must be a finite number above 0, got {alpha!r}.")
    return float(alpha) / (math.sqrt(r) if rank_stabilized else r)


def count(out_features: int, in_features: int, r: int) -> int:
    """Trained parameters of one update by formula: r · (in + out). docs/math.md (3)."""
    return r * (in_features + out_features)


@dataclass(frozen=True)
class Factors:
    """A low-rank update of one weight W0 (out, in): δ = s · B A. docs/math.md (1).

    Attributes:
        A: (r, in), the down-projection.
        B: (out, r), the up-projection.
        scale: s, the number that multiplies B A (see :func:`scaling`).

    Source: Hu et al. 2021, arXiv 2106.09685, equation (3).

    Raises:
        UserError: the shapes of A and B do not chain.
    """

    A: Tensor
    B: Tensor
    scale: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise UserError(
                f"A must be (r, in) and B (out, r) with one r; got A {tuple(self.A.shape)} "
                f"and B {tuple(self.B.shape)}."
            )

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    def delta(self) -> Tensor:
        """δ = s · B A as a dense matrix (out, in), in the factors' own dtype."""
        return (self.B * self.scale) @ self.A

    def apply(self, x: Tensor) -> Tensor:
        """δ x for rows x (..., in) → (..., out), without ever forming (out, in)."""
        return (x @ self.A.T) @ self.B.T * self.scale

    def count(self) -> int:
        """Numbers held in A and B, by counting."""
        return self.A.numel() + self.B.numel()

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal bases and the r by r core of δ: δ = Q_B C Q_Aᵀ.

        Returns Q_B (out, k), C (k, k'), Q_A (in, k') in float64, from two thin QR factorisations,
        so the cost is O((out + in) r²) and no (out, in) matrix is formed. docs/math.md (4).
        """
        q_b, r_b = torch.linalg.qr(self.B.detach().double())
        q_a, r_a = torch.linalg.qr(self.A.detach().double().T)
        return q_b, self.scale * (r_b @ r_a.T), q_a

    def singular_values(self) -> Tensor:
        """The min(r, out, in) largest singular values of δ, falling, in float64."""
        return torch.linalg.svdvals(self.core()[1])

    def truncate(self, k: int) -> Factors:
        """The best rank-k approximation of δ (Eckart-Young), with scale 1, in A's dtype.

        The squared Frobenius error is Σ_{i>k} σi² of :meth:`singular_values`. docs/math.md (5).

        Raises:
            UserError: k is not between 1 and the number of singular values.
        """
        q_b, core, q_a = self.core()
        u, sigma, vh = torch.linalg.svd(core)
        if not 1 <= k <= len(sigma):
            raise UserError(f"k must be between 1 and {len(sigma)}, got {k}.")
        root = sigma[:k].sqrt()
        left = q_b @ (u[:, :k] * root)
        right = (root[:, None] * vh[:k]) @ q_a.T
        return Factors(A=right.to(self.A.dtype), B=left.to(self.B.dtype), scale=1.0)
