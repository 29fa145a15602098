"""Filling a template: escaped, clean, and told what is missing."""

import sys

import jinja2
import pytest

from rankwise.errors import EnvironmentFault
from rankwise.lab.page import TEMPLATES, can_make_pages, fill
from rankwise.lab.theory import run_theory


@pytest.fixture
def template(tmp_path, monkeypatch):
    """Writes a template of its own, in place of those of the package."""
    (tmp_path / "report.css").write_text("p { color: red }", "utf-8")
    monkeypatch.setattr("rankwise.lab.page.TEMPLATES", tmp_path)

    def write(text):
        (tmp_path / "t.jinja").write_text(text, "utf-8")
        return "t.jinja"

    return write


def test_values_are_escaped_and_the_style_sheet_is_given(template):
    name = template("<p>{{ text }}</p><style>{{ css | safe }}</style>")
    page = fill(name, text="<b>&")
    assert page == b"<p>&lt;b&gt;&amp;</p><style>p { color: red }</style>"


def test_characters_that_no_page_can_hold_are_replaced(template):
    assert fill(template("{{ a }}"), a="x\x00\x1b\ud800\n").decode() == "x\ufffd\ufffd?\n"


def test_a_value_that_is_not_given_is_an_error(template):
    with pytest.raises(jinja2.UndefinedError):
        fill(template("{{ missing }}"))


def test_numbers_stay_with_their_sign_and_unit(template):
    page = fill(template("{{ text | tie }}"), text="at r = 8: 74 % or 3 points ± 1").decode()
    assert page == "at r\u00a0=\u00a08: 74\u00a0% or 3\u00a0points ±\u00a01"


def test_cells_are_numbers_as_a_reader_says_them(template):
    name = template("{% for v in cells %}{{ v | cell }};{% endfor %}")
    assert fill(name, cells=[None, 0.123456, 12345, "x"]).decode() == "–;0.1235;12,345;x;"


def test_without_jinja_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(EnvironmentFault, match=r'pip install "rankwise\[report\]"'):
        fill("report.html.jinja")


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_long_work_does_not_begin_without_what_its_page_needs(monkeypatch, tmp_path, module):
    can_make_pages()
    monkeypatch.setitem(sys.modules, module, None)
    folder = tmp_path / "theory"
    with pytest.raises(EnvironmentFault, match=r'pip install "rankwise\[report\]"'):
        run_theory(folder)
    assert not folder.exists()


def test_the_templates_are_part_of_the_package():
    names = {path.name for path in TEMPLATES.iterdir()}
    assert {"report.css", "report.html.jinja", "figure.html.jinja", "theory.html.jinja"} <= names
