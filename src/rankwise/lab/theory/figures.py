"""The figures of the rank experiments, each with its numbers and a description in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rankwise.lab import words
from rankwise.lab.drawing import (
    DASHES,
    MUTED,
    Figure,
    Key,
    Style,
    line_swatch,
    name_axes,
    render,
)
from rankwise.lab.theory.findings import NEAR, ZERO, best_rank, told
from rankwise.lab.theory.records import Bound, Inputs, Samples, TheoryRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["distance", "error_by_rank", "inputs_loss", "inputs_weights", "samples"]

FLOOR = 1e-16
"""A distance below this is the rounding of float64, and is drawn here."""
FROM_ZERO = "Where the bound is 0, which a logarithmic axis cannot show, nothing is drawn."


def error_by_rank(record: TheoryRecord) -> Figure:
    """The learned error at each rank over the bound, one colour for each spectrum."""
    families = _families(record.bounds)

    def paint(axes: Axes) -> None:
        axes.set_yscale("log")
        for style, (_, rows) in _styled(families):
            shown = [row for row in rows if row.bound > ZERO]
            ranks = [row.r for row in shown]
            axes.plot(ranks, [row.bound for row in shown], **style.line(), linewidth=1.3)
            _marks(axes, style, ranks, [row.error for row in shown])
        _rank_axis(axes, "‖Δ* − δ‖² as a share of ‖Δ*‖²")

    return Figure(
        name="error-by-rank",
        title="Learned error and the bound, by rank",
        alt="Line chart of the bound and of the learned error over the rank for the spectra "
        f"{words.listed([name for name, _ in families])}. Every mark stands on its line where the "
        "learned error meets the bound.",
        caption="Line: the bound, the sum of squares of the singular values left out. Mark: what "
        f"training reached. {FROM_ZERO}",
        svg=render("error-by-rank", 300, paint),
        key=tuple(Key(name, style.swatch()) for style, (name, _) in _styled(families)),
        columns=("spectrum", "r", "learned error", "bound", "learned / bound", "last gradient"),
        rows=tuple(
            (
                *(row.spectrum, row.r, row.error, row.bound),
                row.error / row.bound if row.bound > ZERO else None,
                row.gradient,
            )
            for row in record.bounds
        ),
    )


def distance(record: TheoryRecord) -> Figure:
    """How far above the bound the learned error is, as a share of the bound."""
    families = _families([row for row in record.bounds if row.bound > ZERO])

    def above(row: Bound) -> float:
        return row.error / row.bound - 1

    def paint(axes: Axes) -> None:
        axes.set_yscale("log")
        axes.axhline(NEAR, color=MUTED, linewidth=1, linestyle=(0, DASHES[1]))
        for style, (_, rows) in _styled(families):
            ranks = [row.r for row in rows]
            heights = [max(above(row), FLOOR) for row in rows]
            axes.plot(ranks, heights, **style.line(), linewidth=0.8, alpha=0.6)
            _marks(axes, style, ranks, heights)
        _rank_axis(axes, "learned / bound − 1")

    worst = {name: max(rows, key=above) for name, rows in families}
    return Figure(
        name="distance",
        title="How far above the bound training ended",
        alt="Line chart of the distance above the bound over the rank; the farthest is "
        + "; ".join(f"{name}: {told(above(row))} at r = {row.r}" for name, row in worst.items())
        + ".",
        caption=f"Dashed: one percent. A distance below {told(FLOOR)} is rounding and is drawn "
        "there. " + FROM_ZERO,
        svg=render("distance", 300, paint),
        key=(
            *(Key(name, style.swatch()) for style, (name, _) in _styled(families)),
            Key("1 % above the bound", line_swatch("var(--muted)", "5 2")),
        ),
        columns=("spectrum", "r", "learned / bound − 1"),
        rows=tuple((row.spectrum, row.r, above(row)) for _, rows in families for row in rows),
    )


def inputs_loss(record: TheoryRecord) -> Figure:
    """The expected loss under inputs that are not alike, over both candidates for its bound."""
    return _inputs(
        record,
        name="inputs-loss",
        title="In the loss: learned, reduced-rank regression and plain SVD",
        axis="expected loss",
        lines=(
            ("learned", lambda row: row.loss),
            ("bound: reduced-rank regression", lambda row: row.loss_bound),
            ("loss of the truncated SVD of Δ*", lambda row: row.loss_of_svd),
        ),
        caption="The loss weighs each direction by how much of it the inputs have. Its bound is "
        "that of reduced-rank regression; the best approximation of the weights lies above it. ",
    )


def inputs_weights(record: TheoryRecord) -> Figure:
    """The error in the weights under inputs that are not alike."""
    return _inputs(
        record,
        name="inputs-weights",
        title="In the weights: the same updates",
        axis="‖Δ* − δ‖² as a share of ‖Δ*‖²",
        lines=(
            ("learned", lambda row: row.error),
            ("reduced-rank regression", lambda row: row.error_of_regression),
            ("bound: truncated SVD of Δ*", lambda row: row.error_bound),
        ),
        caption="Measured as weights, no update of the rank is nearer to Δ* than its truncated "
        "SVD. An update that is best in the loss gives up directions the inputs hardly have. ",
    )


def _inputs(
    record: TheoryRecord,
    *,
    name: str,
    title: str,
    axis: str,
    lines: Sequence[tuple[str, Callable[[Inputs], float]]],
    caption: str,
) -> Figure:
    """Learned marks over two lines."""
    shown = [row for row in record.inputs if row.loss_bound > ZERO]
    ranks = [row.r for row in shown]
    styles = (Style.category(0), Style.category(0), Style.category(1))
    dashed = Style(styles[2].colour, DASHES[1], styles[2].marker)

    def paint(axes: Axes) -> None:
        axes.set_yscale("log")
        for style, (_, value) in zip((styles[1], dashed), lines[1:], strict=True):
            axes.plot(ranks, [value(row) for row in shown], **style.line(), linewidth=1.3)
        _marks(axes, styles[0], ranks, [lines[0][1](row) for row in shown])
        _rank_axis(axes, axis)

    return Figure(
        name=name,
        title=title,
        alt=f"Line chart over the rank of {words.listed([label for label, _ in lines])}.",
        caption=caption + FROM_ZERO,
        svg=render(name, 300, paint),
        key=(
            Key(lines[0][0], styles[0].swatch(line=False)),
            Key(lines[1][0], styles[1].swatch(marker=False)),
            Key(lines[2][0], dashed.swatch(marker=False)),
        ),
        columns=("r", *(label for label, _ in lines)),
        rows=tuple((row.r, *(value(row) for _, value in lines)) for row in record.inputs),
    )


def samples(record: TheoryRecord) -> Figure:
    """The error of rank, and what estimating from few samples adds to it."""
    by_rows = [
        (rows, list(mine)) for rows, mine in groupby(_by_rows(record.samples), lambda s: s.rows)
    ]
    floor = by_rows[0][1]
    styles = [Style.category(place) for place in (1, 0, 2, 3, 4, 5)]

    def paint(axes: Axes) -> None:
        ranks = [row.r for row in floor]
        axes.fill_between(ranks, [row.of_rank for row in floor], color=MUTED, alpha=0.18, lw=0)
        axes.plot(ranks, [row.of_rank for row in floor], color=MUTED, linewidth=1.3)
        for style, (_, rows) in zip(styles, by_rows, strict=False):
            dashed = Style(style.colour, DASHES[1], style.marker)
            part = [row.of_estimation for row in rows]
            axes.plot(ranks, part, **dashed.line(), linewidth=1.2)
            axes.errorbar(
                ranks,
                [row.error for row in rows],
                yerr=[2 * row.standard_error for row in rows],
                **style.line(),
                marker=style.marker,
                markersize=5,
                linewidth=1.3,
                elinewidth=1,
            )
        axes.set_ylim(bottom=0)
        _rank_axis(axes, "‖Δ* − δ‖² as a share of ‖Δ*‖²")

    least = "; ".join(
        f"from {rows:,} samples the error is least at r = {best_rank(mine).r}"
        for rows, mine in by_rows
    )
    keys = [Key("error of rank (the bound)", line_swatch("var(--muted)"))]
    for style, (rows, _) in zip(styles, by_rows, strict=False):
        dashed = Style(style.colour, DASHES[1], style.marker)
        keys.append(Key(f"{rows:,} samples: all of the error", style.swatch()))
        keys.append(Key(f"{rows:,} samples: of estimation", dashed.swatch(marker=False)))
    return Figure(
        name="samples",
        title="Few samples: error of rank and error of estimation",
        alt=f"Line chart of the error over the rank and its two parts; {least}.",
        caption="All of the error is that of rank and that of estimation together. Mean over "
        f"{record.theory.draws} draws of the samples; bars reach two standard errors up and down.",
        svg=render("samples", 300, paint),
        key=tuple(keys),
        columns=(
            *("samples", "r", "error", "of rank", "of estimation", "of training"),
            "standard error",
        ),
        rows=tuple(
            (
                *(row.rows, row.r, row.error, row.of_rank, row.of_estimation, row.of_training),
                row.standard_error,
            )
            for _, mine in by_rows
            for row in mine
        ),
    )


def power(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis."""
    return told(value)


def _by_rows(rows: Sequence[Samples]) -> list[Samples]:
    return sorted(rows, key=lambda row: (row.rows, row.r))


def _families(rows: Sequence[Bound]) -> list[tuple[str, list[Bound]]]:
    names = dict.fromkeys(row.spectrum for row in rows)
    return [(name, [row for row in rows if row.spectrum == name]) for name in names]


def _styled(
    families: Sequence[tuple[str, list[Bound]]],
) -> list[tuple[Style, tuple[str, list[Bound]]]]:
    return [(Style.category(place), family) for place, family in enumerate(families)]


def _marks(axes: Axes, style: Style, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(x, y, linestyle="", marker=style.marker, color=style.colour, markersize=4.5)


def _rank_axis(axes: Axes, y: str) -> None:
    axes.locator_params(axis="x", integer=True)
    axes.minorticks_off()
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(power)
    name_axes(axes, "rank r", y)
