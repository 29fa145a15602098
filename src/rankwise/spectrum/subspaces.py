"""Where an update acts: its directions, how alike those of two are, and what of W0 it amplifies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import UserError
from rankwise.lowrank import Factors
from rankwise.spectrum.values import finite, spectrum

__all__ = ["Directions", "amplification", "chance", "directions", "similarity"]


@dataclass(frozen=True, eq=False)
class Directions:
    """The singular directions of an update that are more than rounding, in float64.

    Attributes:
        left: U (out, k), what it writes.
        values: σ (k,), falling.
        right: V (in, k), what it reads; δ = U diag(σ) Vᵀ.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def directions(factors: Factors) -> Directions:
    """U, σ and V of δ, without a dense matrix; k = 0 for a zero update. docs/math.md (4).

    Raises:
        UserError: a factor holds numbers that are not finite.
    """
    k = spectrum(factors).rank
    q_b, core, q_a = finite(factors).core()
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    return Directions((q_b @ u)[..., :k], sigma[..., :k], (q_a @ vh.mT)[..., :k])


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """φ(i, j) for all i and j: how much of the first i directions lies in the first j others.

    Formula: φ(i, j) = ‖F_iᵀ S_j‖²_F / min(i, j), with F_i the first i columns of F (n, I) and S_j
    the first j of S (n, J), both orthonormal: 0 where none of them is shared, 1 where the smaller
    space lies in the larger. Returns (I, J); the entry for i and j is [i − 1, j − 1].

    Source: Hu et al. 2021, arXiv 2106.09685, section 7.2 and appendix G; docs/math.md (24).

    Raises:
        UserError: the directions are of spaces of different size.
    """
    if first.shape[-2] != second.shape[-2]:
        raise UserError(
            f"The two updates act on {first.shape[-2]} and {second.shape[-2]} numbers, so their "
            "directions cannot be compared. Compare the same layer of two adapters of one base."
        )
    shared = (first.mT @ second).square().cumsum(-2).cumsum(-1)
    i, j = (torch.arange(1, n + 1, device=shared.device) for n in shared.shape[-2:])
    return shared / torch.minimum(i[:, None], j[None, :])


def chance(i: int, j: int, n: int) -> float:
    """What φ(i, j) is on average for directions drawn at random in n numbers: max(i, j) / n."""
    return max(i, j) / n


def amplification(found: Directions, weight: Tensor) -> float | None:
    """‖δ‖_F / ‖Uᵀ W0 V‖_F: by how much δ strengthens what W0 does along δ's own directions.

    ``weight`` is W0 (out, in). 1 means that W0 is as strong there; a large number, that δ takes up
    directions on which W0 hardly acts. None for a zero update, and where W0 does not act there.

    Source: Hu et al. 2021, arXiv 2106.09685, section 7.3; docs/math.md (24).

    Raises:
        UserError: W0 has another shape.
    """
    wanted = (*found.left.shape[:-1], found.right.shape[-2])
    if tuple(weight.shape) != wanted:
        raise UserError(f"W0 is {tuple(weight.shape)}, and the update is of a weight {wanted}.")
    right = found.right.to(torch.promote_types(weight.dtype, torch.float32))
    seen = found.left.mT @ (weight.to(right.dtype) @ right).double()
    below = float(seen.norm())
    return float(found.values.norm()) / below if below and found.values.numel() else None
