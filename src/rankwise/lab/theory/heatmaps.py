"""Heat maps of the scalings: where each trains, stalls or diverges, over rank and learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rankwise.lab.drawing import Figure, Key, Style, name_axes, render
from rankwise.lab.theory.findings import TRAINS, outcome, rates_told, training_rates
from rankwise.lab.theory.records import Cell, TheoryRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heatmaps"]

LEVELS = (
    (0.01, "≤ 1 % left: trains"),
    (TRAINS, "1 to 10 %: trains"),
    (0.5, "10 to 50 %: stalls"),
    (0.9, "50 to 90 %: stalls"),
    (1.0, "> 90 %: stalls"),
)
"""The most that may be left for each shade, and how it is told."""
DIVERGED = Style(Style.full().colour, (), "X")
SLUGS = {"fixed α": "fixed", "α = 2r": "proportional", "α/√r": "stabilized"}
SCALES = {"fixed α": "s = α/r, α fixed", "α = 2r": "s = α/r, α = 2r", "α/√r": "s = α/√r, α fixed"}


def heatmaps(record: TheoryRecord) -> list[Figure]:
    """One figure for each scaling and optimiser; those of one scaling stand side by side."""
    rules = dict.fromkeys(cell.rule for cell in record.scaling)
    optimizers = dict.fromkeys(cell.optimizer for cell in record.scaling)
    return [
        _heatmap(
            optimizer,
            rule,
            [c for c in record.scaling if (c.optimizer, c.rule) == (optimizer, rule)],
        )
        for rule in rules
        for optimizer in optimizers
    ]


def _heatmap(optimizer: str, rule: str, cells: Sequence[Cell]) -> Figure:
    ranks = sorted({cell.r for cell in cells})
    rates = sorted({cell.rate for cell in cells})

    def paint(axes: Axes) -> None:
        for cell in cells:
            x, y = rates.index(cell.rate), ranks.index(cell.r)
            if cell.left is None:
                axes.plot([x], [y], color=DIVERGED.colour, marker="X", markersize=6)
            else:
                colour = _shade(cell.left).colour
                axes.barh(y, 0.94, height=0.94, left=x - 0.47, color=colour, linewidth=0)
        shown = range(1, len(rates), 3)
        axes.set_xticks(list(shown), [f"{rates[place]:.3g}" for place in shown])
        axes.set_yticks(range(len(ranks)), [str(r) for r in ranks])
        axes.set_xlim(-0.6, len(rates) - 0.4)
        axes.set_ylim(-0.6, len(ranks) - 0.4)
        name_axes(axes, "learning rate (each twice the one before)", "rank r")
        axes.grid(visible=False, axis="y")

    name = f"scaling-{optimizer.split()[0].lower()}-{SLUGS[rule]}"
    trained = "; ".join(f"r = {r}: {rates_told(training_rates(cells, r))}" for r in ranks)
    return Figure(
        name=name,
        title=f"{optimizer[0].upper()}{optimizer[1:]}, {SCALES[rule]}",
        alt=f"Heat map over rank and learning rate. Learning rates that train: {trained}.",
        caption="Shade: the share of the error that is left after training. A cross: it diverged.",
        svg=render(name, 230, paint),
        key=(
            *(
                Key(label, Style(_shade(most).colour, (), "s").swatch(line=False))
                for most, label in LEVELS
            ),
            Key("diverges", DIVERGED.swatch(line=False)),
        ),
        columns=("r", "s", "learning rate", "error left", "outcome"),
        rows=tuple((c.r, c.scale, c.rate, c.left, outcome(c)) for c in cells),
    )


def _shade(left: float) -> Style:
    """The step of the ramp for a share of the error; the more was learned, the stronger."""
    level = next(place for place, (most, _) in enumerate(LEVELS) if left <= most)
    return Style.step(len(LEVELS) - 1 - level, len(LEVELS))
