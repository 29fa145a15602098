"""The plain formula y = x W0ᵀ + δ x, in torch's own operators: the reference of the fast paths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["add_delta_embedding", "add_delta_linear", "branch_embedding", "branch_linear"]


def add_delta_linear(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
) -> Tensor:
    """y = base + s · D(x) Aᵀ Bᵀ in base's dtype.

    Shapes: base (..., out), x (..., in), A (r, in), B (out, r), y (..., out). D is dropout with
    probability ``dropout`` on the branch's input only (Hu et al. 2021, appendix); 0 means none.

    A and B are kept in float32 while the frozen layer may run in bfloat16: the small A and B are
    cast to x's dtype, never x to theirs, so that backward keeps x once, shared with every other
    layer that reads it, and the (N, r) product; where A is frozen (LoRA-FA) the product alone. With
    B zero, y equals base bit for bit. The base layer and x may differ in dtype under autocast;
    base's dtype wins. docs/math.md (6) gives the gradients and the bytes.
    """
    if dropout > 0.0:
        x = F.dropout(x, dropout)
    if x.dtype != base.dtype:
        x = x.to(base.dtype)
    down = F.linear(x, A.to(x.dtype))
    if down.dtype != base.dtype:  # autocast lowers it beside a layer that keeps its dtype
        return base + (scale * F.linear(down, B.to(x.dtype))).to(base.dtype)
    rows = torch.addmm(
        base.reshape(-1, base.shape[-1]),
        down.reshape(-1, down.shape[-1]),
        B.to(x.dtype).T,
        alpha=scale,
    )
    return rows.reshape(base.shape)


def add_delta_embedding(
    base: Tensor, ids: Tensor, A: Tensor, B: Tensor, scale: float, padding_idx: int | None
) -> Tensor:
    """y = base + s · Aᵀ[ids] Bᵀ in base's dtype.

    Shapes: base (..., dim), ids (...) whole numbers below num, A (r, num), B (dim, r). With A zero,
    y equals base bit for bit. An embedding keeps its dtype under autocast, so the sum is not one
    fused product, which autocast would round with base in it.
    """
    return base + scale * branch_embedding(ids, A, B, base.dtype, padding_idx)


def branch_linear(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """B A x for rows x (..., in) → (..., out) in x's dtype."""
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def branch_embedding(
    ids: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, padding_idx: int | None
) -> Tensor:
    """B A applied to one-hot rows: Aᵀ[ids] Bᵀ in ``dtype``.

    Shapes: ids (...) whole numbers below num, A (r, num), B (dim, r), result (..., dim). The row
    of ``padding_idx`` gets no gradient, as in torch.nn.functional.embedding.
    """
    picked = F.embedding(ids, A.T, padding_idx)
    return F.linear(picked.to(dtype), B.to(dtype)).to(dtype)
