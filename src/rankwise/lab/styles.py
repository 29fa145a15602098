"""One style per setting, the same in every figure, and what figures say of their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rankwise.lab import words
from rankwise.lab.drawing import Key, Style
from rankwise.lab.families import families
from rankwise.lab.settings import Setting

__all__ = ["NOT_FROM_ZERO", "Styles", "keys", "listed", "seeds_of", "styles_of", "unit_of"]

Styles = Mapping[str, Style]
"""The style of a setting by its label."""

NOT_FROM_ZERO = "The vertical axis need not start at zero."


def styles_of(settings: Sequence[Setting]) -> Styles:
    """One style per setting, by its label.

    LoRA runs along a ramp from its smallest rank to its largest, each family of ranks with a dash
    of its own; head-only training, full fine-tuning and any other method stand apart from it and
    from each other.
    """
    found: dict[str, Style] = {}
    ranks = sorted({s.first.rank for s in settings if s.first.rank is not None})
    for number, family in enumerate(families(settings)):
        for setting in family.members:
            place = ranks.index(setting.first.rank or 0)
            steps = (Style.step(place, len(ranks), number + more) for more in range(24))
            own = next((s for s in steps if s not in found.values()), Style.step(place, len(ranks)))
            found.setdefault(setting.label, own)
    dedicated = {"head": Style.head(), "full": Style.full()}
    free = (Style.category(n) for n in range(24) if n % 6 in (2, 4, 3))
    for setting in settings:
        if setting.first.rank is None:
            own = dedicated.pop(setting.first.kind, None)
            found[setting.label] = own or next(free, Style.category(0))
    return found


def keys(settings: Sequence[Setting], styles: Styles, *, marker: bool = True) -> tuple[Key, ...]:
    """The key of a figure that draws these settings as lines."""
    return tuple(Key(s.label, styles[s.label].swatch(marker=marker)) for s in settings)


def listed(settings: Sequence[Setting]) -> str:
    """The settings' labels in a sentence."""
    return words.listed([setting.label for setting in settings])


def seeds_of(settings: Sequence[Setting]) -> str:
    """How many seeds stand behind a figure, as a sentence."""
    counts = [len(setting.runs) for setting in settings]
    return "One seed." if max(counts) == 1 else f"Seeds per method: {words.spread(counts)}."


def unit_of(metric: str) -> tuple[float, str]:
    """The factor a metric is drawn with, and its unit for the axis."""
    return (100.0, " (%)") if metric == "accuracy" else (1.0, "")
