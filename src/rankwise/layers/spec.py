"""What one adapted weight is asked to be, and the switch that all updates of an adapter share."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.inits import Fitted, Init, Kaiming
from rankwise.layers.rows import Routing
from rankwise.lowrank import scaling

__all__ = ["Spec", "Switch"]


@dataclass(frozen=True)
class Spec:
    """What one adapted weight is asked to be.

    Attributes:
        r: rank, a whole number of 1 or more.
        alpha: α, a finite number above 0.
        rank_stabilized: s = α/√r when true, else α/r.
        dropout: probability of zeroing an input of the LoRA branch during training, in [0, 1).
        init: how A and B start.
        dora: whether a magnitude of each output trains beside the direction (DoRA).
        freeze_A: whether A keeps its random start and only B trains (LoRA-FA).
        slot: rank to pad to with zeros, so that an adapter of any rank up to it can be loaded
            into the place later (:func:`rankwise.replace`); None for no padding.
    """

    r: int
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0
    init: Init | Fitted = Kaiming()
    dora: bool = False
    freeze_A: bool = False
    slot: int | None = None

    @property
    def scale(self) -> float:
        return scaling(self.r, self.alpha, self.rank_stabilized)


class Switch:
    """Whether one adapter acts; one object for all of its updates, so that switching costs O(1).

    Attributes:
        on: whether it acts.
        routing: None where it acts on whole batches; else which rows go through which adapters.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.on = True
        self.routing: Routing | None = None

    def __repr__(self) -> str:
        return f"Switch({self.adapter!r}, {'on' if self.on else 'off'})"
