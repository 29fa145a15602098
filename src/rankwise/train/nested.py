"""Nested training: a step trains the first ranks alone, so that an adapter may be cut to them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from rankwise.attaching import low_rank_updates
from rankwise.layers import LowRank
from rankwise.methods.trimming import first_ranks

__all__ = ["Nested"]


class Nested:
    """Shows a model with the first k of its ranks, k drawn anew for each step.

    k = ⌊(r + 1)^u⌋ with u uniform on [0, 1), so that every doubling of the rank has an equal share
    of the steps; it follows from the seed and the step alone. Where layers have different ranks
    each shows the same share of its own (:func:`rankwise.methods.trimming.first_ranks`). s = α/r
    stays what it is, so that the first k rows of A and columns of B are the update of rank k, as
    they stand (after Valipour et al. 2022, arXiv 2210.07558, who draw k uniformly; docs/math.md
    (28)).

    A rank that is not shown is put at its start, where it adds nothing: B at zero, or with a start
    A at A0 and B at B0. Its gradient is dropped, and its numbers are put back.

    Args:
        model: with its adapter attached.
        seed: of the draws.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.updates = tuple(low_rank_updates(model).values())
        self.seed = seed
        self.r = max((update.spec.r for update in self.updates), default=1)

    def rank(self, step: int) -> int:
        """k of this step, for the largest rank."""
        u = random.Random(f"{self.seed} {step}").random()
        return min(self.r, int((self.r + 1) ** u))

    @contextlib.contextmanager
    def first(self, k: int) -> Generator[None]:
        """The model with its first k ranks; gradients of the others are zero afterwards."""
        hidden = [part for update in self.updates for part in _hidden(update, k, self.r)]
        kept = [part.of(part.factor.detach()).clone() for part in hidden]
        try:
            for part in hidden:
                place = part.of(part.factor.detach())
                place.zero_() if part.start is None else place.copy_(part.of(part.start))
            yield
        finally:
            for part, own in zip(hidden, kept, strict=True):
                part.of(part.factor.detach()).copy_(own)
                if part.factor.grad is not None:
                    part.of(part.factor.grad).zero_()


@dataclass(frozen=True, eq=False)
class _Part:
    """Ranks of one factor: ``count`` of them from ``first`` on along ``axis``, and its start."""

    factor: Tensor
    start: Tensor | None
    axis: int
    first: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """These ranks of the factor, of its start or of its gradient, as a view."""
        return tensor.narrow(self.axis, self.first, self.count)


def _hidden(update: LowRank, k: int, largest: int) -> Iterator[_Part]:
    """The ranks of an update behind those that go with ``k`` of the largest.

    With B at zero A has no gradient either, so without a start B alone has to be hidden.
    """
    r = update.spec.r
    first = first_ranks(r, k, largest)
    if first < r:
        yield _Part(update.lora_B, update.start_B, -1, first, r - first)
        if update.start_A is not None:
            yield _Part(update.lora_A, update.start_A, -2, first, r - first)
