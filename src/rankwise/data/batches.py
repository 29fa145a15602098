"""Which rows meet in which batch, and the tensors of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankwise.data.encode import Encoded
from rankwise.data.language import IGNORED
from rankwise.data.shuffle import permutation
from rankwise.errors import UserError

__all__ = ["BatchPlan", "collate"]


@dataclass(frozen=True)
class BatchPlan:
    """The batches of every epoch, from (seed, epoch) alone.

    Because nothing else goes in, the pair (epoch, batch index) is the whole state of the data
    order: to resume, call ``epoch(e)`` again and continue at the index.

    Attributes:
        lengths: tokens per row.
        batch_size: rows per batch; the last batch of an epoch may be smaller and is kept.
        seed: sets the order.
        shuffle: False for evaluation: every epoch is the same.
        group: rows of like length meet, which saves padding. With ``shuffle``, rows are shuffled,
            cut into pieces of ``megabatch`` batches, sorted by length inside a piece, and then the
            batches are shuffled; the first batch of epoch 0 is the one with the longest row, so
            that a run that does not fit in memory fails at once. Without ``shuffle``, the longest
            rows come first.
        megabatch: batches per piece; more saves more padding and mixes less.

    Raises:
        UserError: ``batch_size`` or ``megabatch`` is below 1.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    group: bool = True
    megabatch: int = 50

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.megabatch < 1:
            raise UserError(
                "batch_size and megabatch must be 1 or more, got "
                f"{self.batch_size} and {self.megabatch}."
            )

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The row indices of each batch of one epoch; every row is in exactly one batch."""
        if not self.shuffle:
            rows = list(range(len(self.lengths)))
            return self._cut(self._by_length(rows) if self.group else rows)
        rows = permutation(len(self.lengths), self.seed, epoch, "rows")
        if not self.group:
            return self._cut(rows)
        piece = self.megabatch * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(rows), piece):
            batches += self._cut(self._by_length(rows[start : start + piece]))
        order = permutation(len(batches), self.seed, epoch, "batches")
        batches = [batches[i] for i in order]
        if epoch == 0 and batches:
            heaviest = max(range(len(batches)), key=lambda b: self.lengths[batches[b][0]])
            batches[0], batches[heaviest] = batches[heaviest], batches[0]
        return batches

    def _by_length(self, rows: Sequence[int]) -> list[int]:
        """Longest first; rows of one length keep their order."""
        return sorted(rows, key=lambda i: -self.lengths[i])

    def _cut(self, rows: Sequence[int]) -> list[list[int]]:
        size = self.batch_size
        return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def collate(
    encoded: Encoded,
    indices: Sequence[int],
    pad_id: int,
    multiple: int = 1,
    side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """The tensors of one batch, padded to its longest row.

    Returns ``input_ids``, ``attention_mask`` and, where ``encoded`` has them, ``token_type_ids``,
    each (batch, length), int64; and ``labels``: class numbers (batch,) int64, quantities (batch,)
    float32, or targets (batch, length) int64 with -100 at the padding.

    ``multiple`` rounds the length up, for hardware that likes multiples of 8; 1 adds nothing.
    ``side`` is where the padding goes: "left" for generation, which continues at the right end.

    Raises:
        UserError: ``indices`` is empty, or ``multiple`` is below 1.
    """
    if not indices or multiple < 1:
        raise UserError(
            "A batch needs rows, and a multiple of 1 or more; got "
            f"{len(indices)} rows and multiple {multiple}."
        )
    ids = [encoded.input_ids[i] for i in indices]
    length = -(-max(map(len, ids)) // multiple) * multiple

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        gaps = [[fill] * (length - len(row)) for row in rows]
        pairs = zip(rows, gaps, strict=True)
        full = [[*row, *gap] if side == "right" else [*gap, *row] for row, gap in pairs]
        return torch.tensor(full, dtype=torch.int64)

    batch = {
        "input_ids": padded(ids, pad_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = padded([encoded.token_type_ids[i] for i in indices], 0)
    if encoded.labels is not None:
        batch["labels"] = _labels([encoded.labels[i] for i in indices], padded)
    return batch


def _labels(
    chosen: Sequence[int | float | list[int]],
    padded: Callable[[Sequence[Sequence[int]], int], Tensor],
) -> Tensor:
    """Targets of a language model padded with -100; quantities as float32; classes as int64."""
    targets = [label for label in chosen if isinstance(label, list)]
    if targets:
        return padded(targets, IGNORED)
    quantities = any(isinstance(label, float) for label in chosen)
    return torch.tensor(chosen, dtype=torch.float32 if quantities else torch.int64)
