"""Quality against rank, against size and beside the reference, each figure with its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rankwise.lab import words
from rankwise.lab.drawing import (
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
from rankwise.lab.families import Family, families
from rankwise.lab.settings import Comparison, Setting, higher_is_better, pareto
from rankwise.lab.styles import NOT_FROM_ZERO, keys, listed, seeds_of, styles_of, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["beside_reference", "quality_by_rank", "quality_by_size"]

BANDS = 2
"""As many level lines have bands; with more they would hide each other."""


def quality_by_rank(settings: Sequence[Setting]) -> Figure | None:
    """The metric against the rank of LoRA, other methods as level lines; None without LoRA.

    The rank axis is logarithmic with base 2. LoRA runs that differ in more than r and α, or in
    their rule for α, are joined by lines of their own.
    """
    scored = [s for s in settings if math.isfinite(s.score)]
    lines = families(scored)
    if not lines:
        return None
    styles = styles_of(settings)
    levels = [s for s in scored if s.first.rank is None]
    metric = settings[0].first.metric
    factor, unit = unit_of(metric)
    ranks = sorted({s.first.rank for s in scored if s.first.rank is not None})

    def paint(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        for level in levels:
            style = styles[level.label]
            axes.axhline(factor * level.score, **style.line(), linewidth=1.6)
            if (error := level.standard_error) is not None and len(levels) <= BANDS:
                low, high = level.score - 2 * error, level.score + 2 * error
                axes.axhspan(factor * low, factor * high, color=style.colour, alpha=0.12, lw=0)
        for place, family in enumerate(lines):
            own = _line_style(place, lines)
            beside = 1.06**place  # so that families do not cover each other at the same rank
            points = [((s.first.rank or 0) * beside, s) for s in family.members]
            axes.plot(
                [x for x, _ in points],
                [factor * s.score for _, s in points],
                **own.line(),
                linewidth=1.1,
            )
            for x, setting in points:
                _mark(axes, x, setting, own if len(lines) > 1 else styles[setting.label], factor)
        axes.set_xticks(ranks, [str(r) for r in ranks])
        axes.minorticks_off()
        axes.set_xlim(ranks[0] / 1.35, ranks[-1] * 1.35)
        name_axes(axes, "rank r of LoRA (logarithmic)", f"{metric}{unit}")

    others = f"level lines for {listed(levels)}" if levels else "no other method"
    drawn = "Bars and bands" if 0 < len(levels) <= BANDS else "Bars"
    several = len(lines) > 1
    return Figure(
        name="quality-by-rank",
        title=f"{metric.capitalize()} against the rank",
        alt=f"{metric.capitalize()} of LoRA at r = {', '.join(map(str, ranks))}, with {others}.",
        caption=f"{_bars(settings, drawn)} {NOT_FROM_ZERO} "
        + ("Marks of one rank stand side by side. " if several else "")
        + seeds_of(settings),
        svg=render("quality-by-rank", 280, paint),
        key=(
            *(
                Key(family.label, _line_style(place, lines).swatch(marker=several))
                for place, family in enumerate(lines)
            ),
            *keys(levels, styles, marker=False),
        ),
        columns=("method", "r", "α", metric, "standard error", "seeds"),
        rows=tuple(
            (s.label, s.first.rank, s.first.alpha, s.score, s.standard_error, len(s.runs))
            for s in scored
        ),
    )


def _line_style(place: int, lines: Sequence[Family]) -> Style:
    """How a line over the ranks is drawn; one alone leaves the colours to its marks."""
    return Style.family(place) if len(lines) > 1 else Style(MUTED, (), "o")


def quality_by_size(settings: Sequence[Setting]) -> Figure | None:
    """The metric against the parameters trained, with the Pareto frontier; None without scores."""
    scored = [s for s in settings if math.isfinite(s.score) and s.first.counts.trainable > 0]
    if not scored:
        return None
    styles = styles_of(settings)
    metric = settings[0].first.metric
    factor, unit = unit_of(metric)
    frontier = pareto(scored)

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        x: list[float] = [s.first.counts.trainable for s in frontier]
        y = [factor * s.score for s in frontier]
        last = max(s.first.counts.trainable for s in scored)
        axes.step([*x, last], [*y, y[-1]], where="post", color=MUTED, linewidth=1.1)
        for setting in scored:
            _mark(axes, setting.first.counts.trainable, setting, styles[setting.label], factor)
        axes.margins(x=0.08)
        axes.xaxis.set_major_formatter(lambda value, _: words.round_count(value))
        axes.minorticks_off()
        name_axes(axes, "trained parameters (logarithmic)", f"{metric}{unit}")

    better = "higher" if higher_is_better(metric) else "lower"
    return Figure(
        name="quality-by-size",
        title=f"{metric.capitalize()} against trained parameters",
        alt=f"Scatter chart of {metric} against the number of trained parameters for "
        f"{listed(scored)}. On the Pareto frontier: {listed(frontier)}.",
        caption="The stepped line is the Pareto frontier: the best score that so many trained "
        f"parameters have bought ({better} is better). It follows the scores as measured, noise "
        f"included. {_bars(settings, 'Bars')} {seeds_of(settings)}",
        svg=render("quality-by-size", 280, paint),
        key=(
            *(Key(s.label, styles[s.label].swatch(line=False)) for s in scored),
            Key("Pareto frontier", line_swatch("var(--muted)")),
        ),
        columns=("method", "trained parameters", metric, "standard error", "on the frontier"),
        rows=tuple(
            (
                *(s.label, s.first.counts.trainable, s.score, s.standard_error),
                "yes" if s in frontier else "no",
            )
            for s in scored
        ),
    )


def beside_reference(settings: Sequence[Setting], made: Sequence[Comparison]) -> Figure | None:
    """Each setting's difference from the reference, with its interval; None where none is known."""
    known = [(c, c.noise) for c in made if c.noise is not None]
    if not known:
        return None
    styles = styles_of(settings)
    reference = made[0].reference
    metric = reference.first.metric
    factor, _ = unit_of(metric)
    unit = " (points)" if metric == "accuracy" else ""
    higher = higher_is_better(metric)  # to the right is better, whatever the metric
    apart = "less that of the reference" if higher else "of the reference less that of the method"

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=styles[reference.label].colour, linewidth=1.6)
        for place, (found, noise) in enumerate(known):
            style = styles[found.setting.label]
            axes.errorbar(
                [factor * found.difference],
                [place],
                xerr=[factor * noise.half_width()],
                color=style.colour,
                marker=style.marker,
                markersize=6.5,
                elinewidth=1.4,
                markerfacecolor=style.colour if found.clear else "none",
            )
        axes.set_yticks(range(len(known)), [drawable(c.setting.label, 26) for c, _ in known])
        axes.set_ylim(len(known) - 0.5, -0.5)
        name_axes(axes, f"{metric} {apart}{unit}", "")
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")

    rows: list[tuple[Cell, ...]] = [
        (
            *(c.setting.label, c.difference, c.difference - n.half_width()),
            *(c.difference + n.half_width(), n.standard_error, n.degrees, c.p, c.corrected),
            c.verdict,
        )
        for c, n in known
    ]
    names = {v: [c.setting for c, _ in known if c.verdict == v] for v in ("better", "worse")}
    told = "; ".join(f"{v} than it: {listed(found)}" for v, found in names.items() if found)
    return Figure(
        name="beside-reference",
        title=f"Beside {reference.label}",
        alt=f"Differences in {metric} from {reference.label}, with intervals. "
        f"{told[:1].upper() + told[1:] if told else 'None is larger than the noise'}.",
        caption="Positive is better. Bars are 95 % intervals of single differences, over rows and "
        "seeds. A mark is filled where the difference is larger than the noise after Holm's "
        f"correction over all {len(known)}. {seeds_of(settings)}",
        svg=render("beside-reference", 90 + 26 * len(known), paint),
        key=(),
        columns=(
            *("method", "better by", "low", "high", "standard error", "degrees of freedom"),
            *("p", "p after Holm", "verdict"),
        ),
        rows=tuple(rows),
    )


def _mark(axes: Axes, x: float, setting: Setting, style: Style, factor: float) -> None:
    """Draw one setting's score at ``x`` with a bar of two standard errors up and down."""
    error = setting.standard_error
    axes.errorbar(
        [x],
        [factor * setting.score],
        yerr=None if error is None else [2 * factor * error],
        color=style.colour,
        marker=style.marker,
        markersize=6.5,
        elinewidth=1.2,
    )


def _bars(settings: Sequence[Setting], drawn: str) -> str:
    if all(s.standard_error is None for s in settings):
        return "No standard error can be computed from the records."
    return f"{drawn} reach two standard errors up and down, over rows and seeds."
