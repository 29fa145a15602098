"""Pictures of an adapter: its singular values layer by layer, and how alike two adapters are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rankwise.lab import words
from rankwise.lab.drawing import INK, RULE, Cell, Figure, Key, Style, drawable, name_axes, render
from rankwise.lab.inspecting.records import LayerEvidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["overlap_map", "shade", "short_names", "value_map"]

STEPS = 8
"""Shades of a map; each stands for singular values half as large as the one before."""
_MARK = Style(INK, (), "D")


def value_map(layers: Sequence[LayerEvidence]) -> Figure | None:
    """Layers × singular values, a shade for each halving; None where all updates are zero."""
    top = max((layer.spectrum.spectral for layer in layers), default=0.0)
    if not top:
        return None
    names = short_names([layer.name for layer in layers])
    height = max(4.0, min(17.0, 1400 / len(layers)))

    def paint(axes: Axes) -> None:
        for row, layer in enumerate(layers):
            for step, first, count in _runs(layer, top):
                colour = Style.step(STEPS - 1 - step, STEPS).colour
                axes.barh(row, count, height=0.92, left=first, color=colour, linewidth=0)
            if k := layer.spectrum.holding(0.99):
                size = min(4.0, height / 3)
                (mark,) = axes.plot([k - 0.5], [row], color=INK, marker="D", markersize=size)
                mark.set(markeredgecolor=RULE, markeredgewidth=0.6)
        every = max(1, math.ceil(9 / height))
        shown = range(0, len(layers), every)
        axes.set_yticks(list(shown), [_ending(names[i]) for i in shown], fontsize=8.5)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlim(0, max(len(layer.spectrum.values) for layer in layers))
        axes.locator_params(axis="x", integer=True)
        name_axes(axes, "singular values, largest first", "")
        axes.grid(visible=False, axis="y")

    held = [layer.spectrum.holding(0.99) for layer in layers]
    return Figure(
        name="singular-values",
        title="Singular values of every layer",
        alt=f"Heat map of the singular values of {words.count(len(layers), 'layer')}; 99 % of a "
        f"layer's energy is held by {words.spread(held)} of them.",
        caption="Each shade is half of the one before, beginning at the largest singular value of "
        "all layers. The mark is the smallest rank that holds 99 % of a layer's energy. What is "
        "behind the last shade is below 1/128 of the largest.",
        svg=render("singular-values", 70 + height * len(layers), paint),
        key=(
            *(
                Key(
                    f"down to 1/{2 ** (step + 1)}" if step < STEPS - 1 else "less",
                    Style(Style.step(STEPS - 1 - step, STEPS).colour, (), "s").swatch(line=False),
                )
                for step in range(STEPS)
            ),
            Key("99 % of the energy", _MARK.swatch(line=False)),
        ),
        columns=("layer", "k", "singular value", "energy left after k"),
        rows=tuple(row for layer in layers for row in _rows(layer)),
    )


def overlap_map(layers: Sequence[LayerEvidence]) -> Figure | None:
    """φ(i, j) of two adapters, in the mean over the layers that both have; None without any."""
    grids = [layer.overlap.grid for layer in layers if layer.overlap is not None]
    if not grids:
        return None
    first, second = min(len(g) for g in grids), min(len(g[0]) for g in grids)
    mean = [
        [math.fsum(g[i][j] for g in grids) / len(grids) for j in range(second)]
        for i in range(first)
    ]

    def paint(axes: Axes) -> None:
        for i, row in enumerate(mean):
            for step, cells in groupby(enumerate(row), key=lambda cell: _eighth(cell[1])):
                own = [j for j, _ in cells]
                colour = Style.step(step, STEPS).colour
                axes.barh(i + 1, len(own), height=1, left=own[0] + 0.5, color=colour, linewidth=0)
        axes.set_xlim(0.5, second + 0.5)
        axes.set_ylim(0.5, first + 0.5)
        axes.locator_params(integer=True)
        name_axes(axes, "directions of the other adapter", "directions of this one")
        axes.grid(visible=False, axis="y")

    return Figure(
        name="overlap",
        title="Directions that two adapters share",
        alt=f"Heat map of φ(i, j) for up to {first} and {second} directions; φ of the first "
        f"directions is {mean[0][0]:.2f}, of all {mean[-1][-1]:.2f}.",
        caption="φ(i, j) on the side of the inputs (Hu et al. 2021, section 7.2), in the mean over "
        f"{words.count(len(grids), 'layer')}: 0 where the first i and the first j directions share "
        "nothing, 1 where the smaller space lies in the larger.",
        svg=render("overlap", 260, paint),
        key=tuple(
            Key(
                f"{step / STEPS:g} to {(step + 1) / STEPS:g}",
                Style(Style.step(step, STEPS).colour, (), "s").swatch(line=False),
            )
            for step in range(STEPS)
        ),
        columns=("i", "j", "φ"),
        rows=tuple((i + 1, j + 1, mean[i][j]) for i in range(first) for j in range(second)),
    )


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the parts in front that all of them share."""
    split = [name.split(".") for name in names]
    same = 0
    while all(len(parts) > same + 1 for parts in split) and len({p[same] for p in split}) == 1:
        same += 1
    return [".".join(parts[same:]) for parts in split]


def shade(value: float, top: float) -> int | None:
    """How often ``top`` is halved to come down to a value, at most 7; None for zero."""
    if value <= 0:
        return None
    return min(STEPS - 1, int(math.log2(top / value)))


def _runs(layer: LayerEvidence, top: float) -> list[tuple[int, int, int]]:
    """The shade, the first place and the length of each run of values of one shade."""
    live = layer.spectrum.values[: layer.spectrum.rank]
    runs: list[tuple[int, int, int]] = []
    place = 0
    for step, own in groupby(shade(value, top) for value in live):
        count = len(list(own))
        if step is not None:
            runs.append((step, place, count))
        place += count
    return runs


def _ending(name: str, limit: int = 26) -> str:
    """The end of a long name, which tells layers apart."""
    clean = drawable(name, len(name))
    return clean if len(clean) <= limit else "…" + clean[1 - limit :]


def _eighth(share: float) -> int:
    return min(STEPS - 1, int(share * STEPS))


def _rows(layer: LayerEvidence) -> list[tuple[Cell, ...]]:
    found = layer.spectrum
    left = [found.error(k) ** 2 for k in range(1, len(found.values) + 1)]
    return [
        (layer.name, k, value, rest)
        for k, (value, rest) in enumerate(zip(found.values, left, strict=True), 1)
    ]
