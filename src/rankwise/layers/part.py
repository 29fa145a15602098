"""Some outputs of a layer: a block of them by its ends, others by their numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankwise.layers.layout import Rows

__all__ = ["Part"]


class Part(nn.Module):
    """The outputs that an update is for: one block, or any.

    A block (query, key or value of most fused projections) is read and written as a slice; the
    numbers of others are held as a buffer.
    """

    index: Tensor | None

    def __init__(self, rows: Rows, device: torch.device) -> None:
        super().__init__()
        ends = (rows[0], rows[0] + len(rows))
        whole = tuple(range(*ends)) == rows
        self.block = ends if whole else None
        numbers = None if whole else torch.tensor(rows, device=device)
        self.register_buffer("index", numbers)

    def pick(self, y: Tensor, axis: int) -> Tensor:
        """These outputs along an axis of y."""
        if self.block is not None:
            return y.narrow(axis, self.block[0], self.block[1] - self.block[0])
        assert self.index is not None
        return y.index_select(axis, self.index)

    def add(self, y: Tensor, change: Tensor, axis: int) -> Tensor:
        """y with a change added to these outputs along an axis, in y's dtype."""
        change = change.to(y.dtype)
        if self.block is not None:
            return torch.slice_scatter(y, self.pick(y, axis) + change, axis, *self.block)
        assert self.index is not None
        return y.index_add(axis, self.index, change)
