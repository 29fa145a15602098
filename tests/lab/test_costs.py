"""Time and memory as bars: as long as what they show."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from rankwise.lab.costs import peak_memory, wall_time
from rankwise.lab.settings import group_runs


def texts(figure):
    return [e.text for e in ET.fromstring(figure.svg).iter("text")]


def bar_lengths(figure):
    """Widths of the filled rectangles that are drawn in a colour of a series."""
    paths = [
        e.get("d")
        for e in ET.fromstring(figure.svg).iter("path")
        if re.search(r"fill: var\(--[cr]\d\)", e.get("style", ""))
    ]
    xs = [[float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", d)] for d in paths]
    return [max(x) - min(x) for x in xs]


@pytest.mark.parametrize(("draw", "value"), [(wall_time, "seconds"), (peak_memory, "peak_bytes")])
def test_bars_are_as_long_as_what_they_show(sweep, draw, value):
    settings = group_runs(sweep)
    lengths = bar_lengths(draw(settings))
    times = [getattr(setting, value) for setting in settings]
    assert len(lengths) == len(times)
    ratios = [length / time for length, time in zip(lengths, times, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)


def test_long_times_are_in_minutes(record):
    def slow(tree):
        tree["seconds"]["train"] = 900.0

    figure = wall_time(group_runs([record("x" * 40, {"method": "head"}, edit=slow)]))
    assert "wall time of training (minutes)" in texts(figure)
    assert "15" in texts(figure)
    assert figure.rows == (("x" * 40, 900.0, 1),)
    assert "x" * 25 + "…" in texts(figure)


def test_there_are_no_bars_without_times(record):
    run = record("head", {"method": "head"}, edit=lambda m: m["seconds"].update(train=math.nan))
    assert wall_time(group_runs([run])) is None


def test_peak_memory_says_what_held_it(record):
    def on_device(tree):
        tree["memory"] = {"of": "device", "peak": 3_456_000_000}

    figure = peak_memory(group_runs([record("head", {"method": "head"}, edit=on_device)]))
    assert "what torch allocated on the device" in figure.caption
    assert "3,456" in texts(figure)
    assert figure.rows == (("head", 3_456_000_000, 1),)
    inside = peak_memory(group_runs([record("head", {"method": "head"})]))
    assert "libraries included" in inside.caption


def test_there_are_no_bars_of_memory_that_is_not_known(record):
    run = record("head", {"method": "head"}, edit=lambda m: m.update(memory=None))
    assert peak_memory(group_runs([run])) is None
