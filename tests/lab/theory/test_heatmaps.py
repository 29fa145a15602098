"""Heat maps: a shade for each share that is left, a cross for each that diverged."""

import re
from dataclasses import replace

from rankwise.lab.drawing import Style
from rankwise.lab.theory import Cell
from rankwise.lab.theory.heatmaps import heatmaps

NAMES = [
    f"scaling-{optimizer}-{rule}"
    for rule in ("fixed", "proportional", "stabilized")
    for optimizer in ("gradient", "adam")
]


def test_there_is_one_map_for_each_scaling_and_optimiser(measured_record):
    drawn = heatmaps(measured_record)
    assert [figure.name for figure in drawn] == NAMES
    assert len({figure.title for figure in drawn}) == 6
    cells = [row for figure in drawn for row in figure.rows]
    assert len(cells) == len(measured_record.scaling)


def grid(record, lefts):
    cells = tuple(
        Cell("Adam", "α = 2r", r, 2.0, 2.0**place, left)
        for r, row in lefts.items()
        for place, left in enumerate(row)
    )
    return heatmaps(replace(record, scaling=cells))[0]


def test_each_cell_has_the_shade_of_what_is_left(made_record):
    figure = grid(made_record, {1: [1.0, 0.9, 0.5], 2: [0.1, 0.01, None]})
    fills = re.findall(
        r'<path d="[^"]*" clip-path="[^"]*" style="fill: var\((--r\d)\)"', figure.svg
    )
    ramp = [Style.step(place, 5).swatch(line=False) for place in range(5)]
    shades = [re.search(r"var\((--r\d)\)", swatch)[1] for swatch in ramp]
    assert fills == [shades[0], shades[1], shades[2], shades[3], shades[4]]
    assert figure.svg.count("var(--c2)") >= 1


def test_the_rows_say_what_became_of_each_cell(made_record):
    figure = grid(made_record, {1: [1.0, 0.05], 2: [0.1, None]})
    assert figure.rows == (
        (1, 2.0, 1.0, 1.0, "stalls"),
        (1, 2.0, 2.0, 0.05, "trains"),
        (2, 2.0, 1.0, 0.1, "trains"),
        (2, 2.0, 2.0, None, "diverges"),
    )
    assert figure.alt.endswith("Learning rates that train: r = 1: 2; r = 2: 1.")
    assert [key.label for key in figure.key][-1] == "diverges"


def test_without_a_diverging_cell_there_is_no_cross(made_record):
    figure = grid(made_record, {1: [0.2, 0.05], 2: [0.1, 0.3]})
    assert "var(--c2)" not in figure.svg
