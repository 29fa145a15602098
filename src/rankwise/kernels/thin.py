"""Products with r rows or columns, spread over a CPU's threads, of which torch gives them one.

A thin matrix T (r, N) is held as (pieces, r, N / pieces), each piece with its own run of the N
rows, where a product of all pieces at once is faster; else as (r, N).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["add_spread", "gathered", "narrow", "spread"]

_ROWS = 128  # of a piece, at least: fewer cost more than they gain (docs/speed.md)


def narrow(M: Tensor, rows: Tensor) -> Tensor:
    """M rowsᵀ, thin, of M (r, n) and rows (N, n)."""
    parts = _pieces(rows)
    if parts == 1:
        return M @ rows.T
    return torch.bmm(M.expand(parts, -1, -1), _apart(rows, parts).transpose(1, 2))


def gathered(thin: Tensor, rows: Tensor) -> Tensor:
    """thin rows (r, n), the sum over all rows (N, n)."""
    if thin.ndim == 2:
        return thin @ rows
    return torch.bmm(thin, _apart(rows, len(thin))).sum(0)


def spread(thin: Tensor, M: Tensor) -> Tensor:
    """thinᵀ M (N, n) of M (r, n)."""
    if thin.ndim == 2:
        return thin.T @ M
    return torch.bmm(thin.transpose(1, 2), M.expand(len(thin), -1, -1)).flatten(0, 1)


def add_spread(rows: Tensor, thin: Tensor, M: Tensor, scale: float = 1.0) -> None:
    """Add scale · thinᵀ M to rows (N, n), in place."""
    if thin.ndim == 2:
        rows.addmm_(thin.T, M, alpha=scale)
    else:
        parts = len(thin)
        into = _apart(rows, parts)
        into.baddbmm_(thin.transpose(1, 2), M.expand(parts, -1, -1), alpha=scale)


def _apart(rows: Tensor, parts: int) -> Tensor:
    """rows (N, n) as (parts, N / parts, n), a view."""
    return rows.unflatten(0, (parts, -1))


def _pieces(rows: Tensor) -> int:
    """Into how many pieces a product with these rows is cut."""
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
        return 1
    return _divisor(rows.shape[0], torch.get_num_threads())


@functools.lru_cache(maxsize=1024)
def _divisor(count: int, most: int) -> int:
    """The largest number of equal pieces of so many rows, no more than there are threads."""
    return next((n for n in range(min(most, count // _ROWS), 1, -1) if count % n == 0), 1)
