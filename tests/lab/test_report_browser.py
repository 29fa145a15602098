"""The report in a browser: every figure has its place, and nothing is loaded."""

import re

import pytest

FIGURES = [
    "quality-by-rank",
    "quality-by-size",
    "beside-reference",
    "training-loss",
    "evaluation",
    "update-spectrum",
    "wall-time",
    "peak-memory",
]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_every_figure_and_loads_nothing(shown_whole, report, width):
    shown_whole(report, FIGURES, width)


@pytest.mark.slow
def test_a_browser_shows_the_page_dark_where_the_reader_wants_it(measure_page, report):
    light = measure_page(report, 1200, "--blink-settings=preferredColorScheme=1")
    dark = measure_page(report, 1200, "--blink-settings=preferredColorScheme=0")
    bright = [sum(map(int, re.findall(r"\d+", found["ground"])[:3])) for found in (light, dark)]
    assert bright[0] > 700
    assert bright[1] < 100
    assert light["line"] != dark["line"]
