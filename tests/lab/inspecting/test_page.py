"""The page and the record of an inspection: whole, self-contained, and a function of the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.lab.inspecting import Inspection, LayerEvidence, summary, write_inspection
from rankwise.lab.inspecting.figures import overlap_map, shade, short_names, value_map
from rankwise.lab.inspecting.page import layer_rows
from rankwise.lab.inspecting.records import Overlap
from rankwise.spectrum import Gap, Spectrum


def layer(name: str, *values: float, **more: Any) -> LayerEvidence:
    return LayerEvidence(name, 8, 6, 4, 2.0, 56, Spectrum(values), **more)


@pytest.fixture
def found() -> Inspection:
    overlap = Overlap(2, 2, 0.5, 0.25, 0.4, 0.1, 0.33, ((0.25, 0.5), (0.3, 0.5)))
    return Inspection(
        "runs/<first>",
        (
            layer("m.0.q", 4.0, 3.0, 0.01, 0.0, base_norm=50.0, amplification=2.0, overlap=overlap),
            layer("m.0.v", 1.0, 0.5, 0.25, 0.1, base_norm=20.0, amplification=4.0),
            layer("m.1.q", 0.0, 0.0, 0.0, 0.0, base_norm=10.0),
        ),
        base="base",
        other="runs/second",
        notes=("read 3 updates",),
    )


def test_the_page_is_whole_and_loads_nothing(
    found: Inspection, tmp_path: Path, parse: Callable[[str], Any]
) -> None:
    path = write_inspection(found, tmp_path)
    page = path.read_text(encoding="utf-8")
    read = parse(page)
    assert (read.wrong, read.open) == ([], [])
    assert "http://" not in page
    assert "<script" not in page
    assert [a["id"] for a in read.all("figure")] == ["singular-values", "overlap", "layers"]
    assert "<first>" in read.text
    assert all(sentence in read.text.replace("\u00a0", " ") for sentence in summary(found))


def test_the_record_has_every_number(found: Inspection, tmp_path: Path) -> None:
    write_inspection(found, tmp_path)
    record = json.loads((tmp_path / "inspection.json").read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(found.to_json()))
    first = record["layers"][0]
    assert first["singular_values"] == [4.0, 3.0, 0.01, 0.0]
    assert first["norm"] == pytest.approx(25.0001**0.5)
    assert first["rank_holding"] == {"0.9": 2, "0.99": 2, "0.999": 2}
    assert first["relative_norm"] == pytest.approx(0.1, rel=1e-4)
    assert record["parameters_holding"]["0.9"] == 2 * 14


def test_the_same_record_gives_the_same_bytes(found: Inspection, tmp_path: Path) -> None:
    pages = [write_inspection(found, tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_the_sentences_say_what_the_numbers_are(found: Inspection) -> None:
    told = " ".join(summary(found))
    assert "3 layers with updates of rank 4, 168 parameters." in told
    assert "1 of the updates are exactly zero" in told
    assert "‖δ‖ is 0 % to 10 % of ‖W0‖." in told
    assert "2 to 4 times as strong as W0" in told
    assert "2 of the layers have no update" in told
    assert found.layers[0].spectrum.gap == Gap(2, 300.0)


def test_a_fall_to_zero_is_told_as_one(tmp_path: Path) -> None:
    """Not as the number that stands for it, which is that of the rounding."""
    exact = Inspection("exact", (layer("q", 4.0, 3.0, 0.0, 0.0), layer("v", 2.0, 0.0)))
    told = " ".join(summary(exact))
    assert "fall most behind k = 1 to 2, to zero." in told
    gaps = [row[8] for row in layer_rows(exact)]
    assert gaps == ["2 (to zero)", "1 (to zero)"]
    mixed = Inspection("mixed", (layer("q", 4.0, 3.0, 0.0), layer("v", 2.0, 1.5, 0.001)))
    assert "by a factor of" in " ".join(summary(mixed))


def test_an_untrained_adapter_has_a_page_without_a_map(tmp_path: Path) -> None:
    zero = Inspection("zero", (layer("q", 0.0, 0.0),))
    page = write_inspection(zero, tmp_path).read_text(encoding="utf-8")
    assert "1 of the updates are exactly zero" in page
    assert value_map(zero.layers) is None
    assert overlap_map(zero.layers) is None


def test_shades_are_halvings() -> None:
    assert [shade(v, 8.0) for v in (8.0, 4.1, 4.0, 1.0, 1e-9, 0.0)] == [0, 0, 1, 3, 7, None]


def test_names_lose_what_all_share() -> None:
    assert short_names(["a.b.0.q", "a.b.1.q"]) == ["0.q", "1.q"]
    assert short_names(["a.b.q"]) == ["q"]
    assert short_names(["q", "a.q"]) == ["q", "a.q"]


def test_a_long_name_is_told_by_its_end() -> None:
    drawn = value_map([layer(f"a.{i}.attention.output.dense.projection", 1.0, 0.5) for i in (0, 1)])
    assert drawn is not None
    assert "attention.output.dense.p" not in drawn.svg
    assert "output.dense.projection" in drawn.svg


def test_a_large_adapter_is_drawn_in_few_shapes() -> None:
    values = tuple(0.9**i for i in range(64))
    drawn = value_map([layer(f"{i}.q", *values) for i in range(200)])
    assert drawn is not None
    assert len(drawn.svg) < 1_500_000
