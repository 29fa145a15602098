"""The figures of a comparison, each with its numbers, its key and a description in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rankwise.lab import words
from rankwise.lab.drawing import (
    DASHES,
    MUTED,
    Cell,
    Figure,
    Key,
    Style,
    drawable,
    line_swatch,
    name_axes,
    render,
)
from rankwise.lab.records import RunRecord
from rankwise.lab.settings import Setting, differences, higher_is_better, pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "evaluation_curves",
    "quality_by_rank",
    "quality_by_size",
    "styles_of",
    "training_curves",
    "wall_time",
]

Line = tuple[list[float], list[float]]
"""The x and the y of the points of one line."""

NOT_FROM_ZERO = "The vertical axis need not start at zero."


def styles_of(settings: Sequence[Setting]) -> list[Style]:
    """One style per setting, the same in every figure.

    LoRA runs along a ramp from its smallest rank to its largest; head-only training, full
    fine-tuning and any other method stand apart from it and from each other.
    """
    lora = sorted(
        (s for s in settings if s.first.rank is not None), key=lambda s: s.first.rank or 0
    )
    dedicated = {"head": Style.head(), "full": Style.full()}
    free = (Style.category(n) for n in range(24) if n % 6 in (2, 4, 3))
    styles: list[Style] = []
    for setting in settings:
        if setting.first.rank is not None:
            styles.append(Style.step(lora.index(setting), len(lora)))
        else:
            own = dedicated.pop(setting.first.kind, None)
            styles.append(own or next(free, Style.category(0)))
    return styles


def training_curves(settings: Sequence[Setting], points: int = 40) -> Figure | None:
    """Training loss over epochs, one line per run; None when no run logged a finite loss.

    At most ``points`` points are drawn per run, each the mean over equally many log entries.
    Entries whose loss is not finite are left out, and the caption counts them.
    """
    lines: list[tuple[Style, Line]] = []
    rows: list[tuple[Cell, ...]] = []
    sizes: list[int] = []
    lost = 0
    for style, setting in zip(styles_of(settings), settings, strict=True):
        for run in setting.runs:
            finite = [e for e in run.training if math.isfinite(e.loss)]
            lost += len(run.training) - len(finite)
            size = max(1, math.ceil(len(finite) / points))
            chunks = [finite[i : i + size] for i in range(0, len(finite), size)]
            epochs = [fmean(e.epoch for e in chunk) for chunk in chunks]
            losses = [fmean(e.loss for e in chunk) for chunk in chunks]
            steps = [len(chunk) for chunk in chunks]
            lines.append((style, (epochs, losses)))
            sizes += steps
            made = zip(epochs, losses, steps, strict=True)
            rows += [(setting.label, run.seed, *numbers) for numbers in made]
    if not rows:
        return None

    def paint(axes: Axes) -> None:
        for style, (x, y) in lines:
            marker = style.marker if len(x) == 1 else ""
            axes.plot(x, y, **style.line(), marker=marker, markersize=5, linewidth=1.6)
        axes.locator_params(axis="x", integer=True)
        name_axes(axes, "epoch", "training loss")

    gone = f" Log entries left out because their loss is not finite: {lost}." if lost else ""
    return Figure(
        name="training-loss",
        title="Training loss",
        alt=f"Line chart of training loss over epochs for {_listed(settings)}.",
        caption="Loss on the training batches. Log entries behind each point: "
        f"{words.spread(sizes)}.{gone} {_seeds(settings)}",
        svg=render("training-loss", 260, paint),
        key=_keys(settings, marker=False),
        columns=("method", "seed", "epoch", "training loss", "log entries"),
        rows=tuple(rows),
    )


def evaluation_curves(settings: Sequence[Setting]) -> Figure | None:
    """The metric on the evaluation data over epochs; None when it was never measured."""
    metric = settings[0].first.metric
    factor, unit = _unit(metric)
    lines: list[tuple[Style, Line]] = []
    rows: list[tuple[Cell, ...]] = []
    for style, setting in zip(styles_of(settings), settings, strict=True):
        for run in setting.runs:
            seen = [(e.epoch, e.metrics.get(metric, math.nan)) for e in run.evaluations]
            finite = [(epoch, score) for epoch, score in seen if math.isfinite(score)]
            lines.append((style, ([x for x, _ in finite], [factor * y for _, y in finite])))
            rows += [(setting.label, run.seed, epoch, score) for epoch, score in finite]
    if not rows:
        return None

    def paint(axes: Axes) -> None:
        for style, (x, y) in lines:
            axes.plot(x, y, **style.line(), marker=style.marker, markersize=5, linewidth=1.6)
        axes.locator_params(axis="x", integer=True)
        name_axes(axes, "epoch", f"{metric}{unit}")

    return Figure(
        name="evaluation",
        title=f"{metric.capitalize()} during training",
        alt=f"Line chart of {metric} on the evaluation data over epochs for {_listed(settings)}.",
        caption=f"Measured on the evaluation data. {NOT_FROM_ZERO} {_seeds(settings)}",
        svg=render("evaluation", 260, paint),
        key=_keys(settings),
        columns=("method", "seed", "epoch", metric),
        rows=tuple(rows),
    )


def quality_by_rank(settings: Sequence[Setting]) -> Figure | None:
    """The metric against the rank of LoRA, other methods as level lines; None without LoRA.

    The rank axis is logarithmic with base 2. LoRA runs that differ in more than r and α (other
    targets, another start, other options) are joined by lines of their own.
    """
    scored = _scored(settings)
    families: dict[str, list[tuple[int, Style, Setting]]] = {}
    for style, setting in scored:
        if (r := setting.first.rank) is not None:
            families.setdefault(_family(setting.first), []).append((r, style, setting))
    if not families:
        return None
    levels = [(style, setting) for style, setting in scored if setting.first.rank is None]
    metric = settings[0].first.metric
    factor, unit = _unit(metric)
    ranks = sorted({r for members in families.values() for r, _, _ in members})

    def paint(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        for style, level in levels:
            axes.axhline(factor * level.score, **style.line(), linewidth=1.6)
            if (error := level.standard_error) is not None:
                low, high = level.score - 2 * error, level.score + 2 * error
                axes.axhspan(factor * low, factor * high, color=style.colour, alpha=0.12, lw=0)
        for place, members in enumerate(families.values()):
            style = Style(MUTED, DASHES[place % len(DASHES)], "o")
            beside = 1.06**place  # so that families do not cover each other at the same rank
            line = sorted((r * beside, factor * setting.score) for r, _, setting in members)
            axes.plot([x for x, _ in line], [y for _, y in line], **style.line(), linewidth=1.1)
            for r, own, setting in members:
                _mark(axes, r * beside, setting, own, factor)
        axes.set_xticks(ranks, [str(r) for r in ranks])
        axes.minorticks_off()
        axes.set_xlim(ranks[0] / 1.35, ranks[-1] * 1.35)
        name_axes(axes, "rank r of LoRA (logarithmic)", f"{metric}{unit}")

    told = differences([members[0][2].first for members in families.values()], but=("r", "alpha"))
    names = [f"LoRA, {apart}" if apart else "LoRA over its ranks" for apart in told]
    others = f"level lines for {_listed([s for _, s in levels])}" if levels else "no other method"
    return Figure(
        name="quality-by-rank",
        title=f"{metric.capitalize()} against the rank",
        alt=f"{metric.capitalize()} of LoRA at r = {', '.join(map(str, ranks))}, with {others}.",
        caption=f"{_bars(settings, 'Bars and bands')} {NOT_FROM_ZERO} "
        + ("Marks of one rank stand side by side. " if len(families) > 1 else "")
        + _seeds(settings),
        svg=render("quality-by-rank", 280, paint),
        key=(
            *(
                Key(name, Style(MUTED, DASHES[place % len(DASHES)], "o").swatch(marker=False))
                for place, name in enumerate(names)
            ),
            *(Key(setting.label, style.swatch(marker=False)) for style, setting in levels),
        ),
        columns=("method", "r", metric, "standard error", "seeds"),
        rows=tuple(
            (s.label, s.first.rank, s.score, s.standard_error, len(s.runs)) for _, s in scored
        ),
    )


def quality_by_size(settings: Sequence[Setting]) -> Figure | None:
    """The metric against the parameters trained, with the Pareto frontier; None without scores."""
    scored = [(t, s) for t, s in _scored(settings) if s.first.counts.trainable > 0]
    if not scored:
        return None
    metric = settings[0].first.metric
    factor, unit = _unit(metric)
    frontier = pareto([setting for _, setting in scored])

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        x: list[float] = [s.first.counts.trainable for s in frontier]
        y = [factor * s.score for s in frontier]
        last = max(s.first.counts.trainable for _, s in scored)
        axes.step([*x, last], [*y, y[-1]], where="post", color=MUTED, linewidth=1.1)
        for style, setting in scored:
            _mark(axes, setting.first.counts.trainable, setting, style, factor)
        axes.margins(x=0.08)
        axes.xaxis.set_major_formatter(lambda value, _: words.round_count(value))
        axes.minorticks_off()
        name_axes(axes, "trained parameters (logarithmic)", f"{metric}{unit}")

    better = "higher" if higher_is_better(metric) else "lower"
    return Figure(
        name="quality-by-size",
        title=f"{metric.capitalize()} against trained parameters",
        alt=f"Scatter chart of {metric} against the number of trained parameters for "
        f"{_listed([s for _, s in scored])}. On the Pareto frontier: {_listed(frontier)}.",
        caption="The stepped line is the Pareto frontier: the best score that so many trained "
        f"parameters have bought ({better} is better). It follows the scores as measured, noise "
        f"included. {_bars(settings, 'Bars')} {_seeds(settings)}",
        svg=render("quality-by-size", 280, paint),
        key=(
            *(Key(setting.label, style.swatch(line=False)) for style, setting in scored),
            Key("Pareto frontier", line_swatch("var(--muted)")),
        ),
        columns=("method", "trained parameters", metric, "standard error", "on the frontier"),
        rows=tuple(
            (s.label, s.first.counts.trainable, s.score, s.standard_error, _yes(s in frontier))
            for _, s in scored
        ),
    )


def wall_time(settings: Sequence[Setting]) -> Figure | None:
    """Wall time of training per method as bars from zero; None when none was recorded."""
    pairs = zip(styles_of(settings), settings, strict=True)
    timed = [(style, s) for style, s in pairs if math.isfinite(s.seconds)]
    if not timed:
        return None
    minutes = max(s.seconds for _, s in timed) > 300
    unit, scale = ("minutes", 1 / 60) if minutes else ("seconds", 1.0)

    def paint(axes: Axes) -> None:
        for place, (style, setting) in enumerate(timed):
            length = scale * setting.seconds
            axes.barh(place, length, height=0.62, color=style.colour)
            axes.annotate(
                f"{length:.3g}", (length, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(timed)), [drawable(s.label) for _, s in timed])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * max(scale * s.seconds for _, s in timed) or 1)
        name_axes(axes, f"wall time of training ({unit})", "")
        axes.grid(visible=False, axis="y")

    told = "; ".join(f"{s.label} {scale * s.seconds:.3g} {unit}" for _, s in timed)
    return Figure(
        name="wall-time",
        title="Wall time",
        alt=f"Bar chart of the wall time of training: {told}.",
        caption="Time of the whole training by the clock on the wall, on the machine named below; "
        f"other work on that machine is included. {_seeds(settings)}",
        svg=render("wall-time", 80 + 26 * len(timed), paint),
        key=(),
        columns=("method", "wall time of training (s)", "seeds"),
        rows=tuple((s.label, s.seconds, len(s.runs)) for _, s in timed),
    )


def _scored(settings: Sequence[Setting]) -> list[tuple[Style, Setting]]:
    pairs = zip(styles_of(settings), settings, strict=True)
    return [(style, setting) for style, setting in pairs if math.isfinite(setting.score)]


def _mark(axes: Axes, x: float, setting: Setting, style: Style, factor: float) -> None:
    """Draw one setting's score at ``x`` with a bar of two standard errors up and down."""
    error = setting.standard_error
    bar = None if error is None else [2 * factor * error]
    axes.errorbar(
        [x],
        [factor * setting.score],
        yerr=bar,
        color=style.colour,
        marker=style.marker,
        markersize=6.5,
        elinewidth=1.2,
    )


def _family(run: RunRecord) -> str:
    """What a LoRA run is besides its rank and α."""
    return words.plain({k: v for k, v in run.method.items() if k not in ("r", "alpha")})


def _unit(metric: str) -> tuple[float, str]:
    """The factor a metric is drawn with, and its unit for the axis."""
    return (100.0, " (%)") if metric == "accuracy" else (1.0, "")


def _bars(settings: Sequence[Setting], drawn: str) -> str:
    if all(s.standard_error is None for s in settings):
        return "No standard error can be computed from the records."
    return f"{drawn} reach two standard errors up and down."


def _seeds(settings: Sequence[Setting]) -> str:
    counts = [len(s.runs) for s in settings]
    return "One seed." if max(counts) == 1 else f"Seeds per method: {words.spread(counts)}."


def _listed(settings: Sequence[Setting]) -> str:
    return words.listed([s.label for s in settings])


def _keys(settings: Sequence[Setting], *, marker: bool = True) -> tuple[Key, ...]:
    pairs = zip(styles_of(settings), settings, strict=True)
    return tuple(Key(setting.label, style.swatch(marker=marker)) for style, setting in pairs)


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"
