"""What training cost: wall time and peak memory per setting, as bars from zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rankwise.lab.drawing import Figure, Style, drawable, name_axes, render
from rankwise.lab.settings import Setting
from rankwise.lab.styles import seeds_of, styles_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["peak_memory", "wall_time"]


def wall_time(settings: Sequence[Setting]) -> Figure | None:
    """Wall time of training per setting as bars from zero; None when none was recorded."""
    timed = [s for s in settings if math.isfinite(s.seconds)]
    if not timed:
        return None
    minutes = max(s.seconds for s in timed) > 300
    unit, scale = ("minutes", 1 / 60) if minutes else ("seconds", 1.0)
    told = "; ".join(f"{s.label} {scale * s.seconds:.3g} {unit}" for s in timed)
    bars = [(s, scale * s.seconds) for s in timed]
    return Figure(
        name="wall-time",
        title="Wall time",
        alt=f"Bar chart of the wall time of training: {told}.",
        caption="Time of the whole training by the clock on the wall, on the machine named below; "
        f"other work on that machine, such as other runs, is included. {seeds_of(settings)}",
        svg=_draw("wall-time", settings, bars, f"wall time of training ({unit})"),
        key=(),
        columns=("method", "wall time of training (s)", "seeds"),
        rows=tuple((s.label, s.seconds, len(s.runs)) for s in timed),
    )


def peak_memory(settings: Sequence[Setting]) -> Figure | None:
    """The most memory that training held per setting, as bars from zero; None without records."""
    known = [(s, s.peak_bytes) for s in settings]
    bars = [(s, peak / 1e6) for s, peak in known if peak is not None]
    if not bars:
        return None
    on_device = bars[0][0].first.peak_of == "device"
    of = "what torch allocated on the device" if on_device else "the process, libraries included"
    told = "; ".join(f"{s.label} {peak:,.0f} MB" for s, peak in bars)
    return Figure(
        name="peak-memory",
        title="Peak memory",
        alt=f"Bar chart of the peak memory of training: {told}.",
        caption=f"The most memory held at once: {of}. {seeds_of(settings)}",
        svg=_draw("peak-memory", settings, bars, "peak memory (MB)"),
        key=(),
        columns=("method", "peak memory (bytes)", "seeds"),
        rows=tuple((s.label, s.peak_bytes, len(s.runs)) for s, _ in bars),
    )


def _draw(
    name: str, settings: Sequence[Setting], bars: Sequence[tuple[Setting, float]], label: str
) -> str:
    styles = styles_of(settings)

    def paint(axes: Axes) -> None:
        for place, (setting, length) in enumerate(bars):
            style: Style = styles[setting.label]
            axes.barh(place, length, height=0.62, color=style.colour)
            axes.annotate(
                _short(length), (length, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(bars)), [drawable(s.label, 26) for s, _ in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * max(length for _, length in bars) or 1)
        name_axes(axes, label, "")
        axes.grid(visible=False, axis="y")

    return render(name, 80 + 26 * len(bars), paint)


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
