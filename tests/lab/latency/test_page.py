"""The page and its sentences, functions of the record alone."""

from __future__ import annotations

from dataclasses import replace

from rankwise.lab.latency import Interval
from rankwise.lab.latency.page import findings, make_page, over, pictures


def test_a_ratio_is_told_as_percent_over() -> None:
    assert over(Interval(1.031, 1.028, 1.035)) == "+3.1 (2.8 to 3.5)"
    assert over(Interval(0.98, 0.95, 1.01)) == "-2.0 (-5.0 to 1.0)"


def test_the_sentences_say_what_was_found(written) -> None:
    first, lora = findings(written)
    assert first.startswith("The merged model is the plain model's computation")
    assert lora == "LoRA, unmerged: +50.0 (50.0 to 50.0) % over plain at 4 × 16."


def test_what_is_not_the_same_is_said(written) -> None:
    other = replace(written, sameness=replace(written.sameness, operators=False))
    first = findings(other)[0]
    assert "is NOT the plain model's computation" in first
    assert "NOT: it runs the same operators" in first
    page = make_page(other, pictures(other)).decode("utf-8")
    assert 'class="verdict bad"' in page


def test_the_page_is_whole_and_loads_nothing(written, parse) -> None:
    page = make_page(written, pictures(written)).decode("utf-8")
    found = parse(page)
    assert found.wrong == []
    assert found.open == []
    assert "http://" not in page
    assert "https://" not in page
    assert not [tag for tag, _ in found.elements if tag in ("script", "img", "iframe")]
    assert [a["id"] for a in found.all("figure")] == ["overhead", "passes"]
    assert [a["download"] for a in found.all("a")] == ["overhead.csv", "passes.csv"]
    ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_same_record_gives_the_same_bytes(written) -> None:
    assert make_page(written, pictures(written)) == make_page(written, pictures(written))


def test_the_numbers_of_the_figures_are_those_of_the_record(written) -> None:
    overhead, passes = pictures(written)
    assert overhead.rows[1][:3] == ("LoRA, unmerged", 4, 16)
    assert round(float(overhead.rows[1][3] or 0), 6) == 50.0
    assert [row[3] for row in passes.rows][:1] == [1000.0]
