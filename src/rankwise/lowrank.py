"""THE formula: δ = s · (B A − B0 A0), its factors, size, singular values and truncation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import UserError

__all__ = ["Factors", "count", "rank_problems", "scaling"]


def scaling(r: int, alpha: float, rank_stabilized: bool = False) -> float:
    """The factor s in front of B A.

    Formula: s = α / r (Hu et al. 2021, arXiv 2106.09685, section 4.1), or s = α / √r when
    ``rank_stabilized`` (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2). docs/math.md (2).

    Raises:
        UserError: r is not a positive integer, or α is not a finite positive number.
    """
    if (problem := next(rank_problems("r", r), None)) is not None:
        raise UserError(problem)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UserError(f"alpha must be a number, got {alpha!r}.")
    if not math.isfinite(alpha) or alpha <= 0:
        raise UserError(f"alpha must be a finite number above 0, got {alpha!r}.")
    return float(alpha) / (math.sqrt(r) if rank_stabilized else r)


def rank_problems(name: str, r: object, *, optional: bool = False) -> Iterator[str]:
    """What is wrong with a rank of this name, which may be None where it is ``optional``."""
    none = optional and r is None
    if not none and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        more = ", or None" if optional else ""
        yield f"{name} must be a whole number of 1 or more{more}, got {r!r}."


def count(out_features: int, in_features: int, r: int) -> int:
    """Trained parameters of one update by formula: r · (in + out). docs/math.md (3)."""
    return r * (in_features + out_features)


@dataclass(frozen=True)
class Factors:
    """A low-rank update of one weight W0 (out, in): δ = s · (B A − B0 A0). docs/math.md (1).

    A bank of E weights, as of E experts, has one more dimension in front of every factor; each
    weight of the bank has its own update, and every method works on all of them at once.

    Attributes:
        A: (r, in), the down-projection; (E, r, in) for a bank.
        B: (out, r), the up-projection; (E, out, r) for a bank.
        scale: s, the number that multiplies (see :func:`scaling`).
        A0: the frozen start of A where a start is not zero (PiSSA, OLoRA, LoRA-GA), else None.
        B0: the frozen start of B, present exactly when A0 is.

    Source: Hu et al. 2021, arXiv 2106.09685, equation (3). With A = A0 and B = B0 the update is
    zero, so every start leaves the pre-trained function as it is at step 0.

    Raises:
        UserError: the shapes of A and B do not chain, or those of the start do not agree with them.
    """

    A: Tensor
    B: Tensor
    scale: float
    A0: Tensor | None = None
    B0: Tensor | None = None

    def __post_init__(self) -> None:
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if len(a) != len(b) or len(a) not in (2, 3) or a[:-2] != b[:-2] or a[-2] != b[-1]:
            raise UserError(
                f"A must be (r, in) and B (out, r) with one r, or (E, r, in) and (E, out, r); got "
                f"A {a} and B {b}."
            )
        if (self.A0 is None) != (self.B0 is None):
            raise UserError("A start needs both of its factors, A0 and B0, or neither.")
        if self.A0 is not None and self.B0 is not None:
            _check_start(self.A, self.B, self.A0, self.B0)

    @property
    def r(self) -> int:
        return self.A.shape[-2]

    @property
    def in_features(self) -> int:
        return self.A.shape[-1]

    @property
    def out_features(self) -> int:
        return self.B.shape[-2]

    @property
    def bank(self) -> int | None:
        """E, the number of weights in a bank; None for a single weight."""
        return self.A.shape[0] if self.A.ndim == 3 else None

    def delta(self) -> Tensor:
        """δ as a dense matrix (out, in), or (E, out, in), in the factors' own dtype."""
        near = self.conditioned()
        return (near.B * near.scale) @ near.A

    def apply(self, x: Tensor) -> Tensor:
        """δ x for rows x (..., in) → (..., out), without ever forming (out, in).

        For a bank x is (E, N, in), the rows of each weight.
        """
        near = self.conditioned()
        return (x @ near.A.mT) @ near.B.mT * near.scale

    def count(self) -> int:
        """Numbers held in A and B, by counting; a start is frozen and not counted."""
        return self.A.numel() + self.B.numel()

    def pair(self) -> Factors:
        """The same δ without a start: A' = [A; A0] and B' = [B, −B0], number for number.

        This is what a file for an untouched base holds, of rank r + r0. Without a start it is self.
        For computing, :meth:`conditioned` is the better one.
        """
        if self.A0 is None or self.B0 is None:
            return self
        return Factors(
            torch.cat([self.A, self.A0], dim=-2), torch.cat([self.B, -self.B0], dim=-1), self.scale
        )

    def conditioned(self) -> Factors:
        """The same δ without a start and without cancellation, for a start of the same rank.

            B A − B0 A0  =  (B − B0) A + B0 (A − A0)  =  [B − B0, B0] [A; A − A0]

        The differences are small and taken before anything is multiplied or rounded to a shorter
        dtype, and at step 0 they are zero, so δ x is zero to the last bit. docs/math.md (1).
        Without a start it is self; with one of another rank it is :meth:`pair`.
        """
        if self.A0 is None or self.B0 is None:
            return self
        if self.A0.shape != self.A.shape:
            return self.pair()
        return Factors(
            torch.cat([self.A, self.A - self.A0], dim=-2),
            torch.cat([self.B - self.B0, self.B0], dim=-1),
            self.scale,
        )

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal bases and the small core of δ: δ = Q_B C Q_Aᵀ.

        Returns Q_B (out, k), C (k, k'), Q_A (in, k') in float64, from two thin QR factorisations,
        so the cost is O((out + in) r²) and no (out, in) matrix is formed. docs/math.md (4).
        """
        whole = self._wide().conditioned()
        q_b, r_b = torch.linalg.qr(whole.B)
        q_a, r_a = torch.linalg.qr(whole.A.mT)
        return q_b, self.scale * (r_b @ r_a.mT), q_a

    def _wide(self) -> Factors:
        """The same factors in float64, detached."""
        A, B = self.A.detach().double(), self.B.detach().double()
        if self.A0 is None or self.B0 is None:
            return Factors(A, B, self.scale)
        return Factors(A, B, self.scale, self.A0.double(), self.B0.double())

    def singular_values(self) -> Tensor:
        """The min(r, out, in) largest singular values of δ, falling, in float64.

        With a start, r counts both parts: δ may have rank r + r0. For a bank, (E, values).
        """
        return torch.linalg.svdvals(self.core()[1])

    def truncate(self, k: int) -> Factors:
        """The best rank-k approximation of δ (Eckart-Young), with scale 1, in A's dtype.

        The squared Frobenius error is Σ_{i>k} σi² of :meth:`singular_values`. docs/math.md (5).

        Raises:
            UserError: k is not between 1 and the number of singular values.
        """
        q_b, core, q_a = self.core()
        u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
        most = sigma.shape[-1]
        if not 1 <= k <= most:
            raise UserError(f"k must be between 1 and {most}, got {k}.")
        root = sigma[..., :k].sqrt()
        left = q_b @ (u[..., :k] * root[..., None, :])
        right = (root[..., None] * vh[..., :k, :]) @ q_a.mT
        return Factors(A=right.to(self.A.dtype), B=left.to(self.B.dtype), scale=1.0)


def _check_start(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> None:
    wanted = (*A0.shape[:-2], A0.shape[-2], A.shape[-1]), (*B0.shape[:-1], A0.shape[-2])
    same_ends = A0.shape[:-2] == A.shape[:-2] and B0.shape[:-1] == B.shape[:-1]
    if A0.ndim != A.ndim or (tuple(A0.shape), tuple(B0.shape)) != wanted or not same_ends:
        raise UserError(
            "The start must map as the factors do: A0 (r0, in) and B0 (out, r0); got A0 "
            f"{tuple(A0.shape)} and B0 {tuple(B0.shape)} beside A {tuple(A.shape)} and "
            f"B {tuple(B.shape)}."
        )
