"""SVG fit for a page: no outside names, page colours, and colours that anyone can tell apart."""

import csv
import io
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import numpy as np
import pytest

from rankwise.errors import EnvironmentFault
from rankwise.lab import drawing
from rankwise.lab.drawing import Figure, Style, drawable, line_swatch, name_axes, render
from rankwise.lab.page import TEMPLATES

HOSTILE = 'x"> url(#a) #0a0001 font-family: y; $\\frac$ <script>&amp;'


def line(axes):
    axes.plot([1, 2, 3], [3, 1, 2], **Style.category(0).line(), marker="o")
    axes.fill_between([1, 2, 3], [0, 0, 0], [1, 1, 1], color=Style.step(0, 3).colour, alpha=0.2)
    axes.annotate(HOSTILE, (2, 2))
    name_axes(axes, HOSTILE, "über 漢字")


def test_the_drawing_stands_on_its_own():
    svg = render("one", 200, line)
    assert "http" not in svg
    assert "xmlns" not in svg
    assert "xlink" not in svg
    assert "<style" not in svg
    assert "metadata" not in svg
    assert "font-family" not in svg.replace("font-family: y", "")
    root = ET.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("viewBox") == f"0 0 {drawing.WIDTH:g} 200"
    assert (root.get("role"), root.get("aria-labelledby")) == ("img", "one-title")


def test_ids_carry_the_name_of_the_figure_and_references_resolve():
    root = ET.fromstring(render("one", 200, line))
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("one-") for name in ids)
    links = [e.get("href", "").removeprefix("#") for e in root.iter("use")]
    clips = [c for e in root.iter() if (c := e.get("clip-path"))]
    assert links
    assert clips
    assert set(links) <= set(ids)
    assert {re.fullmatch(r"url\(#(.+)\)", clip)[1] for clip in clips} <= set(ids)


def test_text_is_text_and_stays_as_it_is():
    root = ET.fromstring(render("one", 200, line))
    texts = [e.text for e in root.iter("text")]
    assert texts.count(HOSTILE) == 2
    assert "über 漢字" in texts


def test_every_colour_is_the_pages():
    root = ET.fromstring(render("one", 200, line))
    styles = " ".join(e.get("style", "") for e in root.iter())
    assert "#" not in styles
    used = set(re.findall(r"var\(--(\w+)\)", styles))
    assert {"ink", "muted", "rule", "c1", "r1"} <= used


def test_the_same_drawing_gives_the_same_bytes_whatever_matplotlib_is_told():
    import matplotlib as mpl

    first = render("one", 200, line)
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert render("one", 200, line) == first
        assert mpl.rcParams["font.size"] == 30


def test_pyplot_is_not_loaded(repository):
    code = (
        "import sys\n"
        "from rankwise.lab.drawing import render\n"
        "assert 'matplotlib' not in sys.modules\n"
        "render('one', 100, lambda axes: None)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EnvironmentFault, match=r'pip install "rankwise\[report\]"') as caught:
        render("one", 100, line)
    assert caught.value.exit_code == 4


def test_text_for_a_drawing_is_short_and_clean():
    assert drawable("a" * 22) == "a" * 22
    assert drawable("a" * 23) == "a" * 21 + "…"
    assert drawable("a\x00b\ud800") == "a\ufffdb\ufffd"


def test_numbers_go_out_in_full_and_formulas_are_disarmed():
    rows = (("=1+1", 0.1 + 0.2, None), ('a,"b"\nc', -3, -0.5))
    figure = Figure("n", "t", "a", "c", "", (), ("name", "x", "y"), rows)
    read = list(csv.reader(io.StringIO(figure.csv())))
    assert read[0] == ["name", "x", "y"]
    assert read[1] == ["'=1+1", "0.30000000000000004", ""]
    assert read[2] == ['a,"b"\nc', "-3", "-0.5"]


def test_swatches_are_drawings_of_their_style():
    style = Style.category(8)
    root = ET.fromstring(style.swatch())
    colours = {c for e in root.iter() for c in (e.get("stroke"), e.get("fill")) if c}
    assert colours == {"none", "var(--c3)"}
    assert "stroke-dasharray" not in ET.tostring(
        ET.fromstring(Style.category(2).swatch()), "unicode"
    )
    assert "stroke-dasharray" in style.swatch()
    assert "path d=" not in Style.category(0).swatch(line=False)
    assert 'stroke-dasharray="2 2"' in line_swatch("var(--muted)", "2 2")


def test_styles_differ_from_each_other():
    assert len({Style.category(n) for n in range(24)}) == 24
    assert len({Style.step(n, 8).colour for n in range(8)}) == 8
    assert Style.step(0, 1).colour == Style.step(0, 5).colour
    assert len({Style.step(n, 20) for n in range(20)}) == 20


# --- colours -------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color
# vision deficiency", severity 1.0; they act on linear RGB.
VISION = {
    "full": np.eye(3),
    "without red cones": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "without green cones": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "without blue cones": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def linear(colour):
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """Ottosson 2020, "A perceptual color space for image processing"."""
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    mix = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return mix @ np.cbrt(cones @ np.clip(rgb, 0, 1))


def contrast(one, two):
    """WCAG 2.2, contrast ratio."""
    light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, two))
    return (light[1] + 0.05) / (light[0] + 0.05)


def palettes():
    """The colours of the style sheet: light, dark and print."""
    css = (TEMPLATES / "report.css").read_text("utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    found = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in blocks]
    return dict(zip(("light", "dark", "print"), found, strict=True))


@pytest.mark.parametrize("mode", ["light", "dark", "print"])
def test_the_page_defines_every_colour_and_each_can_be_seen(mode):
    palette = palettes()[mode]
    marks = [*(f"c{n}" for n in range(1, 7)), *(f"r{n}" for n in range(1, 9))]
    assert {"ink", "muted", "rule", *marks} <= set(palette)
    for ground in (palette["page"], palette["card"]):
        assert min(contrast(palette[name], ground) for name in marks) >= 2.9
        assert min(contrast(palette[name], ground) for name in ("ink", "muted")) >= 4.5
        assert min(contrast(palette[name], ground) for name in ("good", "bad")) >= 4.5


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_are_told_apart_with_any_vision(mode, vision):
    seen = {k: oklab(VISION[vision] @ linear(v)) for k, v in palettes()[mode].items()}
    for one, two in combinations([f"c{n}" for n in range(1, 7)], 2):
        assert np.linalg.norm(seen[one] - seen[two]) > 0.09, (one, two)
    for step in (f"r{n}" for n in range(1, 9)):
        for other in ("c2", "c6"):  # full fine-tuning and head-only training
            assert np.linalg.norm(seen[step] - seen[other]) > 0.07, (step, other)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_ramp_runs_one_way_in_lightness_with_any_vision(mode, vision):
    palette = palettes()[mode]
    light = [oklab(VISION[vision] @ linear(palette[f"r{n}"]))[0] for n in range(1, 9)]
    steps = [b - a for a, b in pairwise(light)]
    assert all(s > 0.02 for s in steps) or all(s < -0.02 for s in steps)
