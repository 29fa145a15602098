"""What a start is given and what it gives: Place, Start, and the two kinds of starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["Fitted", "Init", "Place", "Start"]


@dataclass(frozen=True)
class Place:
    """One weight that is to be adapted, as a start sees it.

    Attributes:
        name: its adapted name, for messages.
        module: the module whose ``forward`` is called with x, or with ids.
        weight: gives the dense W0 as (out, in), or (E, out, in) for a bank; detached, floating.
            It may be costly, as for a quantised weight.
        out_features: rows of W0.
        in_features: columns of W0; for a convolution in / groups · ∏ kernel.
        r: the rank asked for.
        scale: s, which multiplies B A.
        dtype: of A and B: float32, or float64 for a float64 base.
        device: of A and B. On ``meta`` a start gives shapes and computes nothing.
        lookup: whether this is an embedding: x are ids, A starts zero and B random.
        bank: E, the number of weights in a bank; None for a single weight.
        rows: which outputs of ``module`` these are, for a part of a fused projection; ``weight``
            and ``out_features`` are those of the part already. None means all.
    """

    name: str
    module: nn.Module
    weight: Callable[[], Tensor]
    out_features: int
    in_features: int
    r: int
    scale: float
    dtype: torch.dtype
    device: torch.device
    lookup: bool = False
    bank: int | None = None
    rows: tuple[int, ...] | slice | None = None

    @property
    def is_meta(self) -> bool:
        """Whether there is nothing to compute with, only shapes."""
        return self.device.type == "meta"

    def zeros(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), or (E, r, in) and (E, out, r), all zero."""
        lead = () if self.bank is None else (self.bank,)
        make = torch.empty if self.is_meta else torch.zeros  # torch writes zeros on meta in Python
        A = make(*lead, self.r, self.in_features, dtype=self.dtype, device=self.device)
        B = make(*lead, self.out_features, self.r, dtype=self.dtype, device=self.device)
        return A, B


@dataclass(frozen=True)
class Start:
    """Where A and B start. docs/math.md (1).

    Attributes:
        A: (r, in), or (E, r, in) for a bank.
        B: (out, r), or (E, out, r) for a bank.
        subtract: whether δ = s · (B A − B0 A0), with A0 and B0 frozen copies of these, so that
            δ = 0 at step 0. False where s · B A is zero, or is meant to act from the first step
            (LoftQ).
    """

    A: Tensor
    B: Tensor
    subtract: bool = False


@runtime_checkable
class Init(Protocol):
    """A start that needs no more than the place itself."""

    def start(self, place: Place, generator: torch.Generator | None = None) -> Start:
        """A and B of one place, in tensors that belong to the caller from then on.

        Random numbers come from ``generator``, or from torch's own of the place's device.

        Raises:
            UserError: this start is not defined for this place; the message names it.
        """
        ...


@runtime_checkable
class Fitted(Protocol):
    """A start that looks at the running model first."""

    def fit(self, model: nn.Module, places: Sequence[Place]) -> Mapping[str, Start]:
        """A and B of every place, by name.

        ``model`` is the bare base. It is left exactly as it was: parameters, buffers, gradients,
        ``requires_grad``, modes, hooks and the state of the random numbers.

        Raises:
            UserError: all places for which this start is not defined or has not seen enough.
        """
        ...
