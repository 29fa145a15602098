"""Some of the rows of a batch: a run of them as a view, or any of them by their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BatchRows"]


class BatchRows:
    """Some of the rows of a batch, as one adapter of several acts on.

    The first axis of a tensor may be a multiple of the batch's rows, as where batch and time are
    one axis, or where beams lie beside each other; each row of the batch is then a run of it.

    Args:
        numbers: of the rows, at least one.
        of: how many rows the batch has.

    Attributes:
        run: the first number and the one after the last where the rows lie in a run; None else.
    """

    def __init__(self, numbers: Sequence[int], of: int) -> None:
        self.numbers = tuple(numbers)
        self.of = of
        ends = (self.numbers[0], self.numbers[0] + len(self.numbers))
        self.run = ends if self.numbers == tuple(range(*ends)) else None
        self._indices: dict[torch.device, Tensor] = {}

    def pick(self, t: Tensor) -> Tensor:
        """These rows of t (k · of, ...): a view where they lie in a run, else a copy."""
        each = t.shape[0] // self.of
        if self.run is not None:
            return t[self.run[0] * each : self.run[1] * each]
        if each == 1:
            return t.index_select(0, self._index(t.device))
        return t.unflatten(0, (self.of, each)).index_select(0, self._index(t.device)).flatten(0, 1)

    def add_(self, t: Tensor, change: Tensor) -> None:
        """Add a change to these rows of t (k · of, ...), in place."""
        if self.run is not None:
            self.pick(t).add_(change)
            return
        form = (self.of, t.shape[0] // self.of)
        change = change.unflatten(0, (len(self.numbers), form[1]))
        t.unflatten(0, form).index_add_(0, self._index(t.device), change)

    def _index(self, device: torch.device) -> Tensor:
        """The numbers as a tensor, which may be met again outside of an inference mode."""
        if device not in self._indices:
            with torch.inference_mode(False):
                self._indices[device] = torch.tensor(self.numbers, device=device)
        return self._indices[device]

    def __repr__(self) -> str:
        return f"BatchRows({self.numbers}, of={self.of})"
