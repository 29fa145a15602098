"""The report in a browser: every figure has its place, and nothing is loaded."""

import json
import re
import shutil
import subprocess

import pytest

FIGURES = [
    "quality-by-rank",
    "quality-by-size",
    "training-loss",
    "evaluation",
    "update-spectrum",
    "wall-time",
]


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed")
    return found


MEASURE = """
<script>
addEventListener("load", () => {
  const size = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
  const found = {
    figures: Object.fromEntries([...document.querySelectorAll("figure")]
      .map(f => [f.id, size(f.querySelector("svg.plot"))])),
    marks: [...document.querySelectorAll("svg.plot use, svg.plot path")]
      .filter(e => getComputedStyle(e).stroke === "none" && getComputedStyle(e).fill === "none")
      .length,
    drawn: document.querySelectorAll("svg.plot use, svg.plot path").length,
    wide: document.documentElement.scrollWidth, window: innerWidth,
    small: Math.min(...[...document.querySelectorAll("svg.plot text")]
      .map(t => t.getBoundingClientRect().height)),
    outside: [...document.querySelectorAll("svg.plot text")].filter(t => {
      const b = t.getBoundingClientRect(), s = t.ownerSVGElement.getBoundingClientRect();
      return b.left < s.left - 2 || b.right > s.right + 2 || b.bottom > s.bottom + 2;
    }).map(t => t.textContent),
    loaded: performance.getEntriesByType("resource").map(e => e.name)
      .filter(n => !n.startsWith("data:")),
    ground: getComputedStyle(document.body).backgroundColor,
    line: getComputedStyle(document.querySelector("path[style*='stroke: var(--c2)']")).stroke,
  };
  document.title = "measured " + JSON.stringify(found);
});
</script>
"""


@pytest.fixture
def measured(chromium, report, tmp_path, parse):
    """What a browser lays out at a width."""
    return lambda width, *options: measure(chromium, report, tmp_path, parse, width, *options)


def measure(chromium, report, tmp_path, parse, width, *options):
    """What a browser lays out; the page's own ban on scripts is lifted for the measurement."""
    text = report.read_text("utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text)
    copy = tmp_path / "measured.html"
    # headless windows may not be made narrow, so the page is laid out in a frame of that width
    copy.write_text(text.replace("</body>", MEASURE + "</body>"), "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="measured.html" style="width:{width}px;height:900px;border:0"></iframe>'
        '<script>addEventListener("load", () => setTimeout(() => {'
        "document.title = document.querySelector('iframe').contentDocument.title}, 300))</script>",
        "utf-8",
    )
    words = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--allow-file-access-from-files", "--virtual-time-budget=4000"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"),
        *options,
    ]
    done = subprocess.run(
        [*words, "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = next(text for text in parse(done.stdout).texts if text.startswith("measured "))
    return json.loads(title.removeprefix("measured "))


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
