"""How A and B start, as values: Kaiming (the default) and Gaussian, the other factor zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gaussian", "Init", "Kaiming"]


@dataclass(frozen=True)
class Kaiming:
    """The random factor is Kaiming-uniform with a = √5: U(-1/√fan_in, 1/√fan_in).

    For a linear layer A (r, in) is random, with fan_in = in, and B is zero, so δ = 0 and the
    first step starts from the base function bit for bit. This is the start of the reference
    implementation of Hu et al. 2021 (section 4.1 asks for a random A and a zero B), from
    He et al. 2015, arXiv 1502.01852. For an embedding see :meth:`lookup`.
    """

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
    """

    def draw(self, factor: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill ``factor`` (r, fan_in) in place."""
        with torch.no_grad():
            factor.normal_(0.0, 1.0 / factor.shape[0], generator=generator)

    def lookup(self, factor: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill an embedding's B (dim, r) in place."""
        with torch.no_grad():
            factor.normal_(0.0, 1.0 / factor.shape[1], generator=generator)


Init = Kaiming | Gaussian
