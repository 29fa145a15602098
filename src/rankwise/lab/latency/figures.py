"""The figures of latency: percent over the plain model, and the time of a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankwise.lab.drawing import MUTED, Figure, Key, Style, line_swatch, name_axes, render
from rankwise.lab.latency.records import PLAIN, LatencyRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["overhead", "passes"]

_DECADES = 100  # times that differ by more stand on a logarithmic axis
_WIDTH = 0.7  # of a size's place on the axis, shared by the variants


def overhead(record: LatencyRecord) -> Figure:
    """Percent over the plain model at each size, with intervals."""
    names = [v.name for v in record.variants if v.name != PLAIN]
    styles = _styles(record)
    places = range(len(record.cells))

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=MUTED, linewidth=1.2)
        for number, name in enumerate(names):
            shift = _WIDTH * ((number + 0.5) / len(names) - 0.5)
            found = [record.ratio(name, *cell) for cell in record.cells]
            middle = [100 * (each.middle - 1) for each in found]
            ends = (
                [100 * (each.middle - each.low) for each in found],
                [100 * (each.high - each.middle) for each in found],
            )
            axes.errorbar(
                [place + shift for place in places],
                middle,
                yerr=ends,
                linestyle="",
                color=styles[name].colour,
                marker=styles[name].marker,
                markersize=5,
                elinewidth=1.3,
            )
        _sizes_axis(axes, record, "% over plain")

    rows = [
        (name, batch, length, *(100 * (x - 1) for x in (found.middle, found.low, found.high)))
        for batch, length in record.cells
        for name in names
        for found in [record.ratio(name, batch, length)]
    ]
    return Figure(
        name="overhead",
        title="Time over that of the plain model",
        alt="Marks with intervals for each variant at each batch size and length; a mark on the "
        "line at zero takes the plain model's time.",
        caption="Median of the ratios within each round; the bars are 95 % intervals.",
        svg=render("overhead", 300, paint),
        key=(
            *(Key(name, styles[name].swatch(line=False)) for name in names),
            Key("the plain model", line_swatch("var(--muted)")),
        ),
        columns=("variant", "batch", "length", "% over plain", "95 % from", "to"),
        rows=tuple(rows),
    )


def passes(record: LatencyRecord) -> Figure:
    """The median time of a pass at each size."""
    styles = _styles(record)

    medians = {
        name: [1000 * record.seconds(name, *cell).middle for cell in record.cells]
        for name in styles
    }
    every = [time for times in medians.values() for time in times]

    def paint(axes: Axes) -> None:
        if max(every) > _DECADES * min(every):
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(0, 1.08 * max(every))
        for style, times in zip(styles.values(), medians.values(), strict=True):
            axes.plot(
                range(len(times)), times, **style.line(), marker=style.marker, markersize=4.5, lw=1
            )
        _sizes_axis(axes, record, "milliseconds")

    rows = [
        (name, batch, length, *(1000 * x for x in (found.middle, found.low, found.high)))
        for batch, length in record.cells
        for name in styles
        for found in [record.seconds(name, batch, length)]
    ]
    return Figure(
        name="passes",
        title="Time of a forward pass",
        alt="Lines of the median time of a forward pass over batch sizes and lengths, one for each "
        "variant.",
        caption="Median over the rounds.",
        svg=render("passes", 300, paint),
        key=tuple(Key(name, style.swatch()) for name, style in styles.items()),
        columns=("variant", "batch", "length", "ms", "95 % from", "to"),
        rows=tuple(rows),
    )


def _styles(record: LatencyRecord) -> dict[str, Style]:
    return {variant.name: Style.category(n) for n, variant in enumerate(record.variants)}


def _sizes_axis(axes: Axes, record: LatencyRecord, y: str) -> None:
    cells = record.cells
    axes.set_xticks(range(len(cells)), [f"{batch} × {length}" for batch, length in cells])
    if len(cells) > 5:
        axes.tick_params("x", labelrotation=45)
    axes.set_xlim(-0.5, len(cells) - 0.5)
    name_axes(axes, "rows × tokens", y)
