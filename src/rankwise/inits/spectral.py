"""The leading singular triples of a weight, exact or randomised, and factors made from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.errors import UserError
from rankwise.inits.draws import Kaiming
from rankwise.inits.place import Place

__all__ = ["balanced", "check_iterations", "check_rank", "dense", "leading", "live"]


def check_iterations(owner: str, iterations: int | None) -> None:
    """Raises UserError unless ``iterations`` is None or a whole number of 0 or more."""
    if iterations is None:
        return
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise UserError(
            f"{owner}: iterations must be a whole number of 0 or more, or None for the exact "
            f"decomposition; got {iterations!r}."
        )


def check_rank(owner: str, place: Place, directions: int) -> None:
    """Raises UserError when W0 has not so many directions."""
    most = min(place.out_features, place.in_features)
    if directions > most:
        needed = f"{directions} singular directions" if directions != place.r else "r of them"
        raise UserError(
            f"'{place.name}': {owner} takes r = {place.r} from a weight of "
            f"{place.out_features} by {place.in_features}, which has {most} singular directions "
            f"and not {needed}. Give it a smaller r in rank_pattern, or exclude it."
        )


def dense(place: Place) -> Tensor:
    """W0 as (out, in) or (E, out, in) in the dtype of the factors.

    Raises:
        UserError: it holds numbers that are not finite, or has another shape than the place.
    """
    weight = place.weight().to(device=place.device, dtype=place.dtype)
    lead = () if place.bank is None else (place.bank,)
    if tuple(weight.shape) != (*lead, place.out_features, place.in_features):
        raise UserError(
            f"'{place.name}': the weight is {tuple(weight.shape)}, expected "
            f"{(*lead, place.out_features, place.in_features)}."
        )
    if not bool(torch.isfinite(weight).all()):
        raise UserError(
            f"'{place.name}': the weight holds numbers that are not finite, so it has no "
            "singular value decomposition. Load a sound base, or exclude it."
        )
    return weight


def leading(
    weight: Tensor, k: int, iterations: int | None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., out, k), σ (..., k) falling, and Vᵀ (..., k, in): the k leading singular triples.

    Exact with ``iterations`` None. Else by random projection on k + max(k, 8) directions and so
    many power iterations, at O(out · in · k) in place of O(out · in · min(out, in)): Halko,
    Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1. Each pair has the sign that
    makes the largest entry of v positive. docs/math.md (11).
    """
    out_features, in_features = weight.shape[-2:]
    width = k + max(k, 8)
    if iterations is None or width >= min(out_features, in_features):
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        probe = torch.randn(
            *weight.shape[:-2],
            in_features,
            width,
            dtype=weight.dtype,
            device=weight.device,
            generator=generator,
        )
        basis = torch.linalg.qr(weight @ probe).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(weight.mT @ basis).Q
            basis = torch.linalg.qr(weight @ basis).Q
        inner, sigma, vh = torch.linalg.svd(basis.mT @ weight, full_matrices=False)
        u = basis @ inner
    u, sigma, vh = u[..., :k], sigma[..., :k], vh[..., :k, :]
    peak = vh.gather(-1, vh.abs().argmax(-1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(vh.dtype)
    return u * sign.mT, sigma, vh * sign


def live(sigma: Tensor, size: int) -> Tensor:
    """Which falling singular values of a matrix of this size are more than rounding."""
    return sigma > sigma[..., :1] * torch.finfo(sigma.dtype).eps * 4 * math.sqrt(size)


def balanced(
    place: Place,
    u: Tensor,
    sigma: Tensor,
    vh: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A = √(Σ/s) Vᵀ and B = U √(Σ/s), so that s · B A = U Σ Vᵀ. docs/math.md (11).

    Where σ is zero both would be zero and could never train: these directions get the Kaiming
    start instead, which adds nothing to B A.
    """
    alive = live(sigma, max(place.out_features, place.in_features))
    root = torch.where(alive, sigma / place.scale, torch.zeros_like(sigma)).sqrt()
    A, B = root[..., :, None] * vh, u * root[..., None, :]
    if not bool(alive.all()):
        rest = Kaiming().start(place, generator)
        A = torch.where(alive[..., :, None], A, rest.A)
        B = torch.where(alive[..., None, :], B, rest.B)
    return A.contiguous(), B.contiguous()
