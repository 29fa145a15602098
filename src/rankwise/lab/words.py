"""Numbers as a reader says them: scores, differences, shares, times, sizes and lists."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

__all__ = [
    "amount",
    "brief",
    "chance",
    "count",
    "duration",
    "listed",
    "percent",
    "plain",
    "round_count",
    "score",
    "size",
    "spread",
]


def score(metric: str, value: float) -> str:
    """A score in its metric's unit, an accuracy in percent; "none" when it is not finite."""
    if not math.isfinite(value):
        return "none"
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.4g}"


def amount(metric: str, value: float, *, unit: bool = True) -> str:
    """A difference or an error in the metric's unit; for an accuracy, percentage points."""
    if metric != "accuracy":
        return f"{value:.3g}"
    return f"{100 * value:.1f}" + (" points" if unit else "")


def percent(share: float) -> str:
    """A fraction in percent, to three digits."""
    return f"{100 * share:.3g} %" if share < 0.9995 else f"{100 * share:.0f} %"


def chance(p: float) -> str:
    """A probability to two digits, "< 0.0001" where it is smaller."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes, then hours; a dash when unknown."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(count: int) -> str:
    """Bytes in decimal units: 1 kB is 1000 B."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def count(number: int, noun: str) -> str:
    """A number and its noun, the noun in the plural where there is not one."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def spread(numbers: Sequence[int]) -> str:
    """The range of the numbers: "2 to 5", or "3" when all are the same."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def listed(names: Sequence[str]) -> str:
    """The names as a list in a sentence: "a, b and c", or "a; b, m and c" where one has a comma."""
    mark = "; " if any(", " in name for name in names) else ", "
    return names[0] if len(names) == 1 else mark.join(names[:-1]) + " and " + names[-1]


def plain(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False, sort_keys=True)


def brief(value: Any) -> str:
    """As :func:`plain`, but a long list is told by its length and its ends."""
    if isinstance(value, list) and len(value) > 6:
        return f"{len(value)} of them, {plain(value[0])} to {plain(value[-1])}"
    return plain(value)


def round_count(number: float) -> str:
    """A round number for an axis: "100", "10 k", "1 M"."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:g} {unit}"
    return f"{number:g}"
