"""What was tried on the way to an advice, and the advice, as frozen records that JSON holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["EVERY_LAYER", "PER_LAYER", "Advice", "Step", "Trial", "Verdict", "smallest"]

EVERY_LAYER, PER_LAYER = "one rank for all layers", "ranks by layer"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Something smaller beside a probe, on the tuning rows.

    Attributes:
        score: the metric.
        lost: how much worse than the probe, in units of the metric; below 0 where it is better.
        low, high: between which ``lost`` lies over other rows, 95 %.
        loss_back: the share of what the probe's updates take off the loss that comes back.
        enough: whether it is as good as the probe, as far as can be told.
    """

    score: float
    lost: float
    low: float
    high: float
    loss_back: float
    enough: bool


@dataclass(frozen=True, kw_only=True)
class Step(Verdict):
    """A probe beside the next, of twice its rank: it stays where it is enough.

    Attributes:
        r: its rank.
        larger: the rank of the next.
        larger_score: the metric of the next.
    """

    r: int
    larger: int
    larger_score: float


@dataclass(frozen=True, kw_only=True)
class Trial(Verdict):
    """The probe cut to fewer ranks.

    Attributes:
        kind: how the ranks were chosen, EVERY_LAYER or PER_LAYER.
        size: the rank of every layer, or the budget that was spent layer by layer.
        ranks: by layer, 0 where the update is left out.
        parameters: in A and B.
        error: ‖δ − δ_k‖ / ‖δ‖ over all layers.
    """

    kind: str
    size: int
    ranks: Mapping[str, int]
    parameters: int
    error: float

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(self.ranks.values())


@dataclass(frozen=True)
class Advice:
    """Which rank is enough.

    Attributes:
        out: the folder.
        metric: what quality is.
        rows: how many tuning rows there were.
        steps: the probes on the way to larger ones, each beside the next; empty where the first
            had ranks to spare, or where its rank was given.
        probe_r: the rank of the probe that stayed; ``probe_parameters`` in its updates.
        probe_score: its score; ``silent_score`` that of the probe without its updates.
        gained: whether its updates gain more than the noise.
        gap: the ranks behind which the singular values of its layers fall most, smallest first.
        trials: every cut of it that was tried; all of it is one where the next probe is no better.
        same_rank, by_layer: the smallest that is enough, of each kind; None where none is.
    """

    out: str
    metric: str
    rows: int
    steps: tuple[Step, ...]
    probe_r: int
    probe_parameters: int
    probe_score: float
    silent_score: float
    gained: bool
    gap: tuple[int, ...]
    trials: tuple[Trial, ...]

    @property
    def same_rank(self) -> Trial | None:
        return smallest([t for t in self.trials if t.kind == EVERY_LAYER])

    @property
    def by_layer(self) -> Trial | None:
        return smallest([t for t in self.trials if t.kind == PER_LAYER])

    @property
    def chosen(self) -> Trial | None:
        """The smallest of all that are enough; one rank for all where the sizes are the same.

        None where the updates gain nothing that could be told: every cut is as good then.
        """
        if not self.gained:
            return None
        found = [t for t in (self.same_rank, self.by_layer) if t is not None]
        return min(found, key=lambda t: t.parameters, default=None)

    def to_json(self) -> dict[str, Any]:
        """The record, for advice.json."""
        chosen = self.chosen
        return {"kind": "rankwise advice 2", **asdict(self)} | {
            "chosen": None if chosen is None else asdict(chosen)
        }


def smallest(trials: Sequence[Trial]) -> Trial | None:
    """The smallest trial that is enough, and so is every larger one that was tried.

    A small one that does well beside a larger one that does not has been lucky.
    """
    found: Trial | None = None
    for trial in sorted(trials, key=lambda t: (-t.parameters, -t.size)):
        if not trial.enough:
            break
        found = trial
    return found
