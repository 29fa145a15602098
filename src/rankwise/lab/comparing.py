"""What is compared with what: the reference, the gap, and the smallest update that is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.errors import UserError, nearest
from rankwise.lab.noise import Noise
from rankwise.lab.settings import (
    Comparison,
    Setting,
    against,
    compare,
    higher_is_better,
    noise_of,
)

__all__ = [
    "GapClosed",
    "best_of",
    "between",
    "comparisons",
    "gap_closed",
    "reference_of",
    "smallest_first",
    "smallest_not_told_apart",
]


@dataclass(frozen=True)
class GapClosed:
    """How much of the way from head-only training to full fine-tuning one setting covers.

    Formula: share = (q − q_head) / (q_full − q_head) for scores q; its noise is that of the three
    scores together to first order (the delta method), (dq − share dq_full − (1 − share) dq_head) /
    (q_full − q_head), and is None where the records do not tell it.
    """

    setting: Setting
    share: float
    noise: Noise | None


def reference_of(settings: Sequence[Setting], named: str | None = None) -> Setting | None:
    """What the others are compared with: the setting of this label, or the best of this kind.

    Without a name it is full fine-tuning, else head-only training, else what trains most. None
    without settings.

    Raises:
        UserError: no setting bears the name.
    """
    if named is None:
        most = max(settings, key=lambda s: s.first.counts.trainable, default=None)
        return best_of(settings, "full") or best_of(settings, "head") or most
    labelled = [setting for setting in settings if setting.label == named]
    found = labelled[0] if labelled else best_of(settings, named)
    if found is None:
        names = [*dict.fromkeys(s.first.kind for s in settings), *(s.label for s in settings)]
        raise UserError(
            f"No finished run is the reference '{named}'.{nearest(named, names)} There are: "
            f"{', '.join(names)}."
        )
    return found


def comparisons(usable: Sequence[Setting], reference: str | None = None) -> list[Comparison]:
    """Every usable setting beside the reference, with Holm's correction over all of them."""
    found = reference_of(usable, reference)
    return [] if found is None else against(found, [s for s in usable if s is not found])


def gap_closed(usable: Sequence[Setting], made: Sequence[Comparison]) -> list[GapClosed]:
    """The share of the gap that each LoRA setting covers, the smallest update first.

    Empty unless full fine-tuning is better than head-only training by more than the noise: a share
    of a gap that is not established means nothing.
    """
    head, full = best_of(usable, "head"), best_of(usable, "full")
    if head is None or full is None:
        return []
    if not between(full, head, made).clear or full.better_by(head) <= 0:
        return []
    width = full.better_by(head)
    found: list[GapClosed] = []
    for setting in smallest_first(usable):
        share = setting.better_by(head) / width
        weights = (1 / width, -share / width, (share - 1) / width)
        noise = noise_of(list(zip(weights, (setting, full, head), strict=True)))
        found.append(GapClosed(setting, share, noise))
    return found


def between(one: Setting, two: Setting, made: Sequence[Comparison]) -> Comparison:
    """``one`` beside ``two``: as the comparisons with the reference have it, where they do."""
    both = (one, two)
    own = (c for c in made if any(c.setting is s for s in both) and c.reference in both)
    return next(own, None) or compare(one, two)


def smallest_first(settings: Sequence[Setting]) -> list[Setting]:
    """The LoRA settings, from the fewest trained parameters up; of equals the better first."""
    sign = -1.0 if settings and higher_is_better(settings[0].first.metric) else 1.0
    lora = [s for s in settings if s.first.rank is not None]
    return sorted(lora, key=lambda s: (s.first.counts.trainable, sign * s.score))


def best_of(settings: Sequence[Setting], kind: str | None = None) -> Setting | None:
    """The best scored setting, of one kind if asked; at a tie the one that trains least."""
    best: Setting | None = None
    for setting in settings:
        if kind is not None and setting.first.kind != kind:
            continue
        if best is None or setting.better_by(best) > 0:
            best = setting
    return best


def smallest_not_told_apart(lora: Sequence[Setting]) -> Setting | None:
    """The LoRA setting with the fewest parameters that the best one does not beat by the rule.

    The rule is that of :func:`rankwise.lab.settings.against`, with Holm's correction over all
    others. Where the noise is not known, the best one itself. None without settings.
    """
    best = best_of(lora)
    if best is None:
        return None
    made = against(best, [s for s in lora if s is not best])
    near = [c.setting for c in made if c.noise is not None and not c.clear]
    return smallest_first([best, *near])[0]
