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


@pytest.fixture
def measured(measure_page, report):
    """What a browser lays out at a width."""
    return lambda width, *options: measure_page(report, width, *options)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_every_figure_and_loads_nothing(measured, width):
    found = measured(width)
    assert list(found["figures"]) == FIGURES
    for name, (wide, high) in found["figures"].items():
        assert wide > 300, name
        assert high > 150, name
    assert found["loaded"] == []
    assert found["window"] == width
    assert found["wide"] <= width
    assert found["small"] >= 10
    assert found["outside"] == []


@pytest.mark.slow
def test_a_browser_shows_the_page_dark_where_the_reader_wants_it(measured):
    light = measured(1200, "--blink-settings=preferredColorScheme=1")
    dark = measured(1200, "--blink-settings=preferredColorScheme=0")
    bright = [sum(map(int, re.findall(r"\d+", found["ground"])[:3])) for found in (light, dark)]
    assert bright[0] > 700
    assert bright[1] < 100
    assert light["line"] != dark["line"]
