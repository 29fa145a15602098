"""Curves over the epochs: the loss of training, and the metric on the evaluation data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rankwise.lab import words
from rankwise.lab.comparing import best_of, smallest_not_told_apart
from rankwise.lab.drawing import Cell, Figure, name_axes, render
from rankwise.lab.families import families
from rankwise.lab.records import RunRecord
from rankwise.lab.settings import Setting
from rankwise.lab.styles import (
    NOT_FROM_ZERO,
    Styles,
    keys,
    listed,
    seeds_of,
    styles_of,
    unit_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MOST", "Part", "evaluation_curves", "parts_of", "training_curves"]

MOST = 8
"""So many settings share a figure of curves; more are shown in parts."""


@dataclass(frozen=True)
class Part:
    """Settings whose curves stand in one figure; ``name`` and ``title`` are "" for all of them."""

    name: str
    title: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class _Point:
    epoch: float
    value: float
    entries: int


def parts_of(settings: Sequence[Setting]) -> list[Part]:
    """The settings in parts that can be read: the methods side by side, and LoRA over its ranks.

    Among the methods LoRA is represented by its smallest update that is enough, or its best.
    """
    if len(settings) <= MOST:
        return [Part("", "", tuple(settings))]
    others = [s for s in settings if s.first.rank is None]
    lora = [s for s in settings if s.first.rank is not None]
    usable = [s for s in lora if s.usable]
    speaker = smallest_not_told_apart(usable) or best_of(lora)
    methods = [s for s in settings if s.first.rank is None or s is speaker]
    parts = [Part("-methods", ", method by method", tuple(methods))] if others else []
    for number, family in enumerate(families(settings)):
        parts.append(Part(f"-ranks-{number + 1}", f", {family.label}", family.members))
    return parts


def training_curves(
    settings: Sequence[Setting], part: Part | None = None, points: int = 40
) -> Figure | None:
    """Training loss over epochs, one line per setting; None when none logged a finite loss.

    Each line is the mean over the seeds, step by step, and at most ``points`` points of it are
    drawn, each the mean over equally many steps. Entries whose loss is not finite are left out, and
    the caption counts them.
    """
    part = part or Part("", "", tuple(settings))
    styles = styles_of(settings)
    lines: dict[str, list[_Point]] = {}
    lost = 0
    for setting in part.settings:
        every = [event for run in setting.runs for event in run.training]
        finite = [(e.step, e.epoch, e.loss) for e in every if math.isfinite(e.loss)]
        lost += len(every) - len(finite)
        means = _means(finite)
        size = max(1, math.ceil(len(means) / points))
        chunks = [means[i : i + size] for i in range(0, len(means), size)]
        lines[setting.label] = [
            _Point(
                fmean(p.epoch for p in chunk),
                fmean(p.value for p in chunk),
                sum(p.entries for p in chunk),
            )
            for chunk in chunks
        ]
    if not any(lines.values()):
        return None
    gone = f" Log entries left out because their loss is not finite: {lost}." if lost else ""
    sizes = [point.entries for line in lines.values() for point in line]
    return Figure(
        name=f"training-loss{part.name}",
        title=f"Training loss{part.title}",
        alt=f"Line chart of training loss over epochs for {listed(part.settings)}.",
        caption=f"Loss on the training batches{_over(part.settings)}. Log entries behind each "
        f"point: {words.spread(sizes)}.{gone} {seeds_of(part.settings)}",
        svg=_draw(f"training-loss{part.name}", lines, styles, "training loss", 1.0, marks=False),
        key=keys(part.settings, styles, marker=False),
        columns=("method", "epoch", "training loss", "log entries"),
        rows=_rows(lines),
    )


def evaluation_curves(settings: Sequence[Setting], part: Part | None = None) -> Figure | None:
    """The metric on the evaluation data over epochs; None when it was never measured."""
    part = part or Part("", "", tuple(settings))
    styles = styles_of(settings)
    metric = settings[0].first.metric
    factor, unit = unit_of(metric)
    lines = {s.label: _means(_evaluations(s.runs, metric)) for s in part.settings}
    if not any(lines.values()):
        return None
    return Figure(
        name=f"evaluation{part.name}",
        title=f"{metric.capitalize()} during training{part.title}",
        alt=f"Line chart of {metric} on the evaluation data over epochs for "
        f"{listed(part.settings)}.",
        caption=f"Measured on the evaluation data{_over(part.settings)}. {NOT_FROM_ZERO} "
        f"{seeds_of(part.settings)}",
        svg=_draw(f"evaluation{part.name}", lines, styles, f"{metric}{unit}", factor, marks=True),
        key=keys(part.settings, styles),
        columns=("method", "epoch", metric, "seeds"),
        rows=_rows(lines),
    )


def _evaluations(runs: Sequence[RunRecord], metric: str) -> Iterable[tuple[int, float, float]]:
    for run in runs:
        for event in run.evaluations:
            value = event.metrics.get(metric, math.nan)
            if math.isfinite(value):
                yield event.step, event.epoch, value


def _means(entries: Iterable[tuple[int, float, float]]) -> list[_Point]:
    """(step, epoch, value) of several runs as one line: the mean at each step."""
    at: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for step, epoch, value in entries:
        at[step].append((epoch, value))
    return [
        _Point(fmean(e for e, _ in found), fmean(v for _, v in found), len(found))
        for _, found in sorted(at.items())
    ]


def _draw(
    name: str,
    lines: dict[str, list[_Point]],
    styles: Styles,
    label: str,
    factor: float,
    *,
    marks: bool,
) -> str:
    def paint(axes: Axes) -> None:
        for setting, points in lines.items():
            style = styles[setting]
            axes.plot(
                [p.epoch for p in points],
                [factor * p.value for p in points],
                **style.line(),
                marker=style.marker if marks or len(points) == 1 else "",
                markersize=5,
                linewidth=1.6,
            )
        axes.locator_params(axis="x", integer=True)
        name_axes(axes, "epoch", label)

    return render(name, 260, paint)


def _rows(lines: dict[str, list[_Point]]) -> tuple[tuple[Cell, ...], ...]:
    return tuple((s, p.epoch, p.value, p.entries) for s, points in lines.items() for p in points)


def _over(settings: Sequence[Setting]) -> str:
    return ", mean over the seeds" if any(len(s.runs) > 1 for s in settings) else ""
