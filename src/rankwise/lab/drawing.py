"""How a figure becomes inline SVG: colours as CSS variables, text as text, the same bytes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from rankwise.errors import EnvironmentFault
from rankwise.lab.records import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "DASHES",
    "MUTED",
    "Cell",
    "Figure",
    "Key",
    "Style",
    "csv_text",
    "drawable",
    "line_swatch",
    "name_axes",
    "render",
]

Cell = str | int | float | None
"""One cell of a figure's numbers; None where there is nothing to say."""

WIDTH = 400.0
"""Width of every figure in CSS pixels before the page scales it."""
# Stand-ins that Matplotlib draws with; the SVG then names CSS variables in their place, so that
# one drawing reads on a light and on a dark page.
INK, MUTED, RULE = "#010101", "#020202", "#030303"
_CATEGORIES = tuple(f"#0a000{n}" for n in range(1, 7))
_RAMP = tuple(f"#0b000{n}" for n in range(1, 9))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    **{stand_in: f"var(--c{n})" for n, stand_in in enumerate(_CATEGORIES, 1)},
    **{stand_in: f"var(--r{n})" for n, stand_in in enumerate(_RAMP, 1)},
}
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.8), (7, 2, 1.5, 2))
_MARKERS = {
    "o": '<circle cx="14" cy="6" r="3.5"/>',
    "s": '<rect x="11" y="3" width="6" height="6"/>',
    "^": '<path d="M14 2L18 9.5H10Z"/>',
    "D": '<path d="M14 1.5L18.5 6L14 10.5L9.5 6Z"/>',
    "v": '<path d="M14 10L18 2.5H10Z"/>',
    "P": '<path d="M12.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z"/>',
    "X": '<path d="M14 8l2 2 2-2-2-2 2-2-2-2-2 2-2-2-2 2 2 2-2 2 2 2z"/>',
}
_CYCLE = "os^Dv"


def _marker(index: int) -> str:
    return _CYCLE[index % len(_CYCLE)]


@dataclass(frozen=True)
class Key:
    """One entry of a figure's key: what is drawn so, and a small drawing of the line or mark."""

    label: str
    swatch: str


@dataclass(frozen=True)
class Figure:
    """A drawing and everything needed to read it without seeing it.

    ``svg`` is markup to stand inside an HTML page that defines the CSS variables --ink, --muted,
    --rule, --c1 to --c6 and --r1 to --r8. ``rows`` are the numbers that are drawn, under
    ``columns``.
    """

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    key: tuple[Key, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def csv(self) -> str:
        """The numbers as comma-separated values with a header, at full precision.

        A text that a spreadsheet would take for a formula is preceded by an apostrophe.
        """
        return csv_text(self.columns, self.rows)


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Comma-separated values with a header; see :meth:`Figure.csv`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"'{c}" if isinstance(c, str) and c[:1] in "=+-@" else c for c in row])
    return out.getvalue()


@dataclass(frozen=True)
class Style:
    """How one series looks in every figure: colour, dash and marker, so that none stands alone."""

    colour: str
    dash: tuple[float, ...]
    marker: str

    @staticmethod
    def category(index: int) -> Style:
        """The style of a thing without an order; 24 of them look different from each other."""
        dash = DASHES[index // len(_CATEGORIES) % len(DASHES)]
        return Style(_CATEGORIES[index % len(_CATEGORIES)], dash, _marker(index))

    @staticmethod
    def head() -> Style:
        """The style of head-only training."""
        return Style(_CATEGORIES[5], DASHES[1], "X")

    @staticmethod
    def full() -> Style:
        """The style of full fine-tuning."""
        return Style(_CATEGORIES[1], DASHES[3], "P")

    @staticmethod
    def step(index: int, steps: int, family: int = 0) -> Style:
        """The style of step ``index`` of ``steps`` in a row, on the ramp of --r1 to --r8.

        Steps of another family share the colours and have another dash.
        """
        place = round(index / max(steps - 1, 1) * (len(_RAMP) - 1))
        return Style(_RAMP[place], DASHES[family % len(DASHES)], _marker(index + family))

    @staticmethod
    def family(index: int) -> Style:
        """The style of a whole row of steps, in the colours of the text."""
        return Style((INK, MUTED)[index % 2], DASHES[index % len(DASHES)], _marker(index))

    def line(self) -> dict[str, Any]:
        """Keywords for ``Axes.plot`` that draw a line in this style."""
        return {"color": self.colour, "linestyle": (0, self.dash) if self.dash else "-"}

    def swatch(self, *, line: bool = True, marker: bool = True) -> str:
        """A drawing of this style, 28 by 12 pixels, for a figure's key."""
        colour = _VARIABLES[self.colour]
        dash = f' stroke-dasharray="{" ".join(map(str, self.dash))}"' if self.dash else ""
        stroke = f'<path d="M0 6H28" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        mark = f'<g fill="{colour}">{_MARKERS[self.marker]}</g>'
        return _swatch((stroke if line else "") + (mark if marker else ""))


def drawable(text: str, limit: int = 22) -> str:
    """The text cut to ``limit`` characters, without those an SVG cannot hold."""
    clean = printable(text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _swatch(inside: str) -> str:
    return f'<svg width="28" height="12" viewBox="0 0 28 12" aria-hidden="true">{inside}</svg>'


def line_swatch(colour: str, dash: str = "") -> str:
    """A drawing of a bare line, 28 by 12 pixels, for a figure's key."""
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    return _swatch(f'<path d="M0 6H28" fill="none" stroke="{colour}" stroke-width="1.5"{pattern}/>')


def name_axes(axes: Axes, x: str, y: str) -> None:
    """Label both axes and give the plot its quiet frame."""
    axes.set_xlabel(x)
    axes.set_ylabel(drawable(y, 60))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="y")
    axes.set_axisbelow(True)


_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rankwise",
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 11.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 11.5,
    "axes.linewidth": 1.0,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.formatter.useoffset": False,
}


def render(name: str, height: float, paint: Callable[[Axes], None]) -> str:
    """Draw with ``paint`` on fresh axes and return markup fit to stand inside a page.

    Matplotlib's own settings file is not consulted, so the same records give the same bytes.

    Raises:
        EnvironmentFault: Matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise EnvironmentFault(
            f"Figures need Matplotlib, which cannot be imported ({error}). "
            'Install it with: pip install "rankwise[report]"'
        ) from error
    import warnings

    out = io.StringIO()
    with mpl.rc_context(), warnings.catch_warnings():
        # A name in a script that Matplotlib's font lacks is drawn by the browser's font instead.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        canvas = Canvas(figsize=(WIDTH / 72, height / 72), layout="constrained")
        FigureCanvasSVG(canvas)
        paint(canvas.add_subplot())
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name)


def _inline(document: str, name: str) -> str:
    """Turn Matplotlib's SVG document into markup that can stand in a page beside others.

    Namespaces, metadata and the style sheet go; ids carry the figure's name; the stand-in colours
    become CSS variables; the font is the page's; coordinates keep two decimals.
    """
    root = ET.fromstring(document)  # noqa: S314 (written by Matplotlib a moment ago)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag != "text":
            element.text = None
        element.tail = None
        element.attrib = {
            key.rpartition("}")[2]: _attribute(key.rpartition("}")[2], value, name)
            for key, value in element.attrib.items()
        }
    for unused in ("width", "height", "version", "id"):
        root.attrib.pop(unused, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title", "class": "plot"}
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    """One attribute of Matplotlib's SVG, rewritten for a page."""
    if key == "id":
        return f"{name}-{value}"
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        return re.sub(r"#0[0-9a-f]{5}", lambda m: _VARIABLES.get(m[0], m[0]), value)
    value = value.replace("url(#", f"url(#{name}-")
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    if key in ("d", "x", "y", "transform", "points"):
        value = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)
    return " ".join(value.split())
