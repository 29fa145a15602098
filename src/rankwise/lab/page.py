"""How a template becomes a page: one HTML file that needs no network and no scripts."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rankwise.errors import EnvironmentFault
from rankwise.lab.drawing import Cell, Figure

__all__ = ["TEMPLATES", "can_make_pages", "fill"]

TEMPLATES = Path(__file__).parent / "templates"
_JINJA = "A report needs Jinja2"
_REMEDY = 'Install it with: pip install "rankwise[report]"'


def can_make_pages() -> None:
    """See to it that pages can be made, before long work whose end they are.

    Raises:
        EnvironmentFault: Matplotlib or Jinja2 is not installed.
    """
    for package, use in (("matplotlib", "Figures need Matplotlib"), ("jinja2", _JINJA)):
        if importlib.util.find_spec(package) is None:
            raise EnvironmentFault(f"{use}, which is not installed. {_REMEDY}")


def fill(template: str, **values: Any) -> bytes:
    """The bytes of a page: the template of that name, with these values and the style sheet.

    Values are escaped. Characters that no page can hold are replaced. Beside Jinja2's own filters
    a template has ``cell`` (a number of a figure's table), ``csv_link`` (a figure's numbers as a
    download that is part of the page) and ``tie`` (a number stays with its sign and its unit).

    Raises:
        EnvironmentFault: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise EnvironmentFault(
            f"{_JINJA}, which cannot be imported ({error}). {_REMEDY}"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "csv_link": _csv_link, "tie": _tie}
    css = (TEMPLATES / "report.css").read_text("utf-8")
    html = environment.get_template(template).render(css=css, **values)
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", html)
    return clean.encode("utf-8", "replace")


def _tie(text: str) -> str:
    """The text with a number kept on one line with its sign and its unit."""
    return re.sub(r"(?<=\d) (?=%|points\b)|(?<=\br) (?==)|(?<=\br =) |(?<=±) ", "\u00a0", text)


def _cell(value: Cell) -> str:
    """One number of a figure's table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _csv_link(figure: Figure) -> str:
    """A figure's numbers as the address of a download that is part of the page."""
    return "data:text/csv;charset=utf-8," + quote(figure.csv().encode("utf-8", "replace"))
