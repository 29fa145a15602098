"""The principal directions of a stream of rows, kept in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.inits.spectral import leading, live

__all__ = ["Sketch"]


@dataclass(frozen=True)
class Sketch:
    """What is known of the rows seen so far, about their mean. docs/math.md (14).

    With X the centred rows, XᵀX ≈ rowsᵀ rows: the leading part Σ Vᵀ of their singular value
    decomposition, exact as long as nothing had to be cut off. Memory O(width · in).

    Attributes:
        count: rows seen.
        mean: (in,).
        rows: Σ Vᵀ (k, in), k ≤ width.
        total: ‖X‖², exactly, whatever was cut off.

    Source: Ross, Lim, Lin and Yang 2008, "Incremental learning for robust visual tracking",
    section 3.
    """

    count: int
    mean: Tensor
    rows: Tensor
    total: float

    @staticmethod
    def empty(like: Tensor) -> Sketch:
        """Nothing seen yet, of rows like ``like`` (..., in)."""
        width = like.shape[-1]
        return Sketch(0, like.new_zeros(width), like.new_zeros(0, width), 0.0)

    def updated(self, x: Tensor, width: int) -> Sketch:
        """With the rows x (N, in), keeping at most ``width`` directions."""
        n, m = self.count, x.shape[0]
        mean = x.mean(0)
        x = x - mean
        shift = math.sqrt(n * m / (n + m)) * (self.mean - mean)
        total = self.total + float(x.square().sum() + shift.square().sum())
        stacked = torch.cat([self.rows, x, shift[None]]) if n else x
        k = min(width, *stacked.shape)
        generator = torch.Generator(x.device).manual_seed(n)
        _, sigma, vh = leading(stacked, k, 4, generator)
        rows = sigma[:, None] * vh
        return Sketch(n + m, (n * self.mean + m * mean) / (n + m), rows, total)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Orthonormal directions (k, in) and the share of the variance each explains, falling.

        Those whose variance is no more than rounding, of the rows or of their mean, are left out.
        """
        sigma = torch.linalg.vector_norm(self.rows, dim=1)
        rounding = torch.finfo(sigma.dtype).eps * math.sqrt(self.count) * float(self.mean.norm())
        found = live(sigma, self.rows.shape[1]) & (sigma > 4 * rounding)
        sigma = sigma[found]
        return self.rows[found] / sigma[:, None], sigma.square() / self.total
