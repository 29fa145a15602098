"""Starts that are drawn at random: Kaiming (the default), Gaussian and Orthogonal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import UserError
from rankwise.inits.place import Place, Start

__all__ = ["Gaussian", "Kaiming", "Orthogonal"]


@dataclass(frozen=True)
class Kaiming:
    """The random factor is Kaiming-uniform with a = √5: U(-1/√fan_in, 1/√fan_in).

    For a linear layer A (r, in) is random, with fan_in = in, and B is zero, so δ = 0 and the
    first step starts from the base function bit for bit. This is the start of the reference
    implementation of Hu et al. 2021 (section 4.1 asks for a random A and a zero B), from
    He et al. 2015, arXiv 1502.01852. For an embedding see :meth:`lookup`. docs/math.md (9).
    """

    def start(self, place: Place, generator: torch.Generator | None = None) -> Start:
        """A random and B zero; for an embedding A zero and B random."""
        return _one_random(self, place, generator)

    def draw(self, factor: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill ``factor`` (rows, fan_in) in place."""
        bound = 1.0 / math.sqrt(factor.shape[1])
        with torch.no_grad():
            factor.uniform_(-bound, bound, generator=generator)

    def lookup(self, factor: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill an embedding's B (dim, r) in place with N(0, 1), the standard start of an embedding.

        An embedding starts with A (r, num) zero and B random, so that only the rows of the ids
        that occur in the data ever change.
        """
        with torch.no_grad():
            factor.normal_(0.0, 1.0, generator=generator)


@dataclass(frozen=True)
class Gaussian:
    """The random factor is N(0, (1/r)²), the other factor zero.

    Hu et al. 2021, section 4.1: "a random Gaussian initialization for A and zero for B". The
    standard deviation 1/r is the one that PEFT uses for ``init_lora_weights="gaussian"``.
    docs/math.md (9).
    """

    def start(self, place: Place, generator: torch.Generator | None = None) -> Start:
        """A random and B zero; for an embedding A zero and B random."""
        return _one_random(self, place, generator)

    def draw(self, factor: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill ``factor`` (r, fan_in) in place."""
        with torch.no_grad():
            factor.normal_(0.0, 1.0 / factor.shape[0], generator=generator)

    def lookup(self, factor: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill an embedding's B (dim, r) in place."""
        with torch.no_grad():
            factor.normal_(0.0, 1.0 / factor.shape[1], generator=generator)


@dataclass(frozen=True)
class Orthogonal:
    """Half of the rank starts in A, the other half in B, on rank directions that are orthogonal.

    Formula: A = Q1ᵀ a, B = b Q2, where Q1 and Q2 (r/2, r) are the two halves of the rows of an
    orthogonal matrix, so Q2 Q1ᵀ = 0 and B A = 0 although neither factor is zero; a (r/2, in) and
    b (out, r/2) are N(0, 0.1²). The matrix is the identity here, so that B A = 0 holds bit for bit
    and no frozen start is needed: A = [a; 0] and B = [0, b]. Any other orthogonal matrix gives the
    same AᵀA and BBᵀ, hence the same gradient descent, up to that rotation of the rank.

    Source: datta0.github.io/posts/rethink-lora-init, "Orthogonal initialisation", as PEFT has it
    with a random matrix (``init_lora_weights="orthogonal"``). docs/math.md (10).
    """

    def start(self, place: Place, generator: torch.Generator | None = None) -> Start:
        """A = [a; 0] and B = [0, b].

        Raises:
            UserError: r is odd, or the place is an embedding.
        """
        half, odd = divmod(place.r, 2)
        if odd:
            raise UserError(
                f"'{place.name}': Orthogonal shares the rank between A and B, so r must be even, "
                f"got {place.r}. Take {place.r + 1}."
            )
        if place.lookup:
            raise UserError(
                f"'{place.name}': Orthogonal is not defined for an embedding, whose A must start "
                "at zero if the rows of ids that never occur are to stay as they are. Use Kaiming "
                "or Gaussian there, or put it in exclude_modules."
            )
        A, B = place.zeros()
        if not place.is_meta:
            for factor in (A[..., :half, :], B[..., half:]):
                for one in factor if place.bank is not None else (factor,):
                    one.normal_(0.0, 0.1, generator=generator)
        return Start(A, B)


def _one_random(init: Kaiming | Gaussian, place: Place, generator: torch.Generator | None) -> Start:
    A, B = place.zeros()
    if not place.is_meta:
        draw, factor = (init.lookup, B) if place.lookup else (init.draw, A)
        for one in factor if place.bank is not None else (factor,):  # a bank weight by weight
            draw(one, generator)
    return Start(A, B)
