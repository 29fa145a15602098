"""The theory's page in a browser: every figure has its place on any width, light and dark."""

import re

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_every_figure_and_loads_nothing(measure_page, folder, width):
    found = measure_page(folder / "report.html", width)
    assert len(found["figures"]) == 11
    for name, (wide, high) in found["figures"].items():
        assert wide > 300, name
        assert high > 150, name
    assert found["loaded"] == []
    assert found["window"] == width
    assert found["wide"] <= width
    assert found["small"] >= 10
    assert found["outside"] == []


@pytest.mark.slow
def test_a_browser_shows_the_page_dark_where_the_reader_wants_it(measure_page, folder):
    page = folder / "report.html"
    light = measure_page(page, 1200, "--blink-settings=preferredColorScheme=1")
    dark = measure_page(page, 1200, "--blink-settings=preferredColorScheme=0")
    bright = [sum(map(int, re.findall(r"\d+", found["ground"])[:3])) for found in (light, dark)]
    assert bright[0] > 700
    assert bright[1] < 100
    assert light["line"] != dark["line"]
