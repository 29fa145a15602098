"""The theory's page: whole, self-contained, and a function of its record alone."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from rankwise.errors import EnvironmentFault
from rankwise.lab.theory.page import make_page, sections, summary

FIGURES = [
    *("error-by-rank", "distance", "inputs-loss", "inputs-weights", "samples"),
    *("scaling-gradient-fixed", "scaling-adam-fixed"),
    *("scaling-gradient-proportional", "scaling-adam-proportional"),
    *("scaling-gradient-stabilized", "scaling-adam-stabilized"),
]


@pytest.fixture(scope="module")
def page(measured_record):
    return make_page(measured_record, sections(measured_record)).decode("utf-8")


def test_the_page_is_well_formed(page, parse):
    found = parse(page)
    assert page.startswith("<!doctype html>")
    assert found.wrong == []
    assert found.open == []
    ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = {a["aria-labelledby"] for _, a in found.elements if "aria-labelledby" in a}
    assert labels <= set(ids)
    assert len(found.all("h1")) == 1


def test_the_page_loads_nothing(page, parse):
    found = parse(page)
    assert "http://" not in page
    assert "https://" not in page
    assert not [tag for tag, _ in found.elements if tag in ("script", "img", "iframe", "object")]
    links = [a[k] or "" for _, a in found.elements for k in ("href", "src", "action") if k in a]
    assert all(link.startswith(("#", "data:")) for link in links)


def test_every_figure_has_its_numbers_as_a_table_and_as_a_download(page, parse):
    found = parse(page)
    assert [a["id"] for a in found.all("figure")] == FIGURES
    assert [a["download"] for a in found.all("a")] == [f"{name}.csv" for name in FIGURES]
    assert len(found.all("table")) == len(FIGURES)
    assert len(found.all("figcaption")) == len(FIGURES)


def test_the_page_says_what_was_asked_found_and_how(page, parse):
    text = parse(page).text
    for words in (
        "A linear layer with 6 inputs and 8 outputs",
        "At all of the 24 pairs of a spectrum and a rank",
        "Adam on the exact expected loss for 400 steps",
        "At the bound 24 of 24",
        "Error falls with r 4 of 4",
        "Versions python",
        "scaling_steps 40",
        "Time of the computation",
    ):
        assert words in text
    assert "{" not in text


def test_what_does_not_hold_is_marked(made_record, parse):
    bounds = (replace(made_record.bounds[0], error=5.0), *made_record.bounds[1:])
    record = replace(made_record, bounds=bounds)
    found = parse(make_page(record, sections(record)).decode("utf-8"))
    assert "11 of 12" in found.text
    assert [a for _, a in found.elements if a.get("class") == "bad"]


@pytest.mark.slow
def test_the_same_record_gives_the_same_bytes_in_another_process(
    tmp_path, folder, page, repository
):
    code = (
        "import pathlib, sys\n"
        "from rankwise.lab.theory.records import read_record\n"
        "from rankwise.lab.theory.page import make_page, sections\n"
        "record = read_record(pathlib.Path(sys.argv[1]))\n"
        "pathlib.Path(sys.argv[2]).write_bytes(make_page(record, sections(record)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "PYTHONHASHSEED": "7"}
    words = [sys.executable, "-c", code, str(folder / "records.json"), str(tmp_path / "page")]
    subprocess.run(words, check=True, env=environment)
    assert (tmp_path / "page").read_text("utf-8") == page
    assert (folder / "report.html").read_text("utf-8") == page


def test_the_terminal_is_told_the_same_sentences(page, parse, measured_record):
    text = parse(page).text
    lines = summary(measured_record).splitlines()
    assert sum(line.startswith("  ") for line in lines) == 4 + 3 + 3 + 6
    assert all(line.strip() in text for line in lines)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_without_the_extra_the_remedy_is_named(monkeypatch, made_record, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentFault, match=r'pip install "rankwise\[report\]"'):
        make_page(made_record, sections(made_record))
