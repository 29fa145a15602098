"""Starts from the weight itself: PiSSA by its singular vectors, OLoRA by its QR factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankwise.inits.place import Place, Start
from rankwise.inits.spectral import balanced, check_iterations, check_rank, dense, leading

__all__ = ["OLoRA", "PiSSA"]


@dataclass(frozen=True)
class PiSSA:
    """A and B start as the principal part of W0, which then trains in place of W0's own.

    Formula: with the r leading singular triples of W0 = U Σ Vᵀ, A0 = √(Σ/s) Vᵀ and
    B0 = U √(Σ/s), so that s · B0 A0 is the best approximation of rank r of W0; the update is
    δ = s · (B A − B0 A0). Where the paper writes W0 − s · B0 A0 into the base, here W0 is left.

    Attributes:
        iterations: None for the exact decomposition. A number of power iterations for the
            randomised one, which is far cheaper for a large weight; the paper's fast form takes
            16, and 4 are enough for most.

    Source: Meng et al. 2024, arXiv 2404.02948, section 3; docs/math.md (11).

    Raises:
        UserError: iterations is not a whole number of 0 or more.
    """

    iterations: int | None = None

    def __post_init__(self) -> None:
        check_iterations("PiSSA", self.iterations)

    def start(self, place: Place, generator: torch.Generator | None = None) -> Start:
        """The principal part of the place's weight; of each weight of a bank.

        Raises:
            UserError: r is above the smaller side of W0, or W0 is not finite.
        """
        check_rank("PiSSA", place, place.r)
        if place.is_meta:
            return Start(*place.zeros(), subtract=True)
        triples = leading(dense(place), place.r, self.iterations, generator)
        return Start(*balanced(place, *triples, generator), subtract=True)


@dataclass(frozen=True)
class OLoRA:
    """A and B start as the first r rows and columns of the QR factors of W0.

    Formula: W0 = Q R with orthonormal columns Q and a diagonal of R that is not negative;
    B0 = Q[:, :r], A0 = R[:r, :]; δ = s · (B A − B0 A0). Only the first r columns of W0 are
    decomposed, because the first r columns of Q depend on no others, and R[:r] = Q[:, :r]ᵀ W0:
    O(out · in · r) operations. As in the paper, the start is not divided by s.

    Source: Büyükakyüz 2024, arXiv 2406.01775, section 3; docs/math.md (12).
    """

    def start(self, place: Place, generator: torch.Generator | None = None) -> Start:
        """The leading QR factors of the place's weight; nothing random is drawn.

        Raises:
            UserError: r is above the smaller side of W0, or W0 is not finite.
        """
        check_rank("OLoRA", place, place.r)
        if place.is_meta:
            return Start(*place.zeros(), subtract=True)
        weight = dense(place)
        q, r = torch.linalg.qr(weight[..., : place.r])
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        sign = torch.where(diagonal < 0, -1.0, 1.0).to(place.dtype)
        B = q * sign[..., None, :]
        return Start((B.mT @ weight).contiguous(), B.contiguous(), subtract=True)
