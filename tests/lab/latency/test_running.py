"""A whole measurement: what it counts, what it writes, and that a stop leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import UserError
from rankwise.lab.latency import RECORDS, REPORT, LatencyRecord, Sizes, run_latency
from rankwise.train.config import FitConfig, make_config
from rankwise.train.reporter import Silent

NAMES = ["plain", "merged", "LoRA, unmerged", "adapter, Houlsby", "adapter, Pfeiffer", "prefix"]


def options(folder: Path, **more: Any) -> FitConfig:
    values = {"model": str(folder), "data": "", "out": "", "dtype": "float32", "device": "cpu"}
    return make_config(values | more, "test")


def test_every_variant_is_timed_at_every_size(measured: tuple[LatencyRecord, Path]) -> None:
    record, _ = measured
    assert [variant.name for variant in record.variants] == NAMES
    assert record.cells == ((1, 8), (2, 8))
    assert [(t.variant, t.batch, len(t.seconds)) for t in record.timings] == [
        (name, batch, 3) for batch in (1, 2) for name in NAMES
    ]


def test_merged_is_the_same_by_counts(measured: tuple[LatencyRecord, Path]) -> None:
    record, _ = measured
    plain, merged, lora, *others = record.variants
    assert record.sameness.same
    assert (merged.operators, merged.flops, merged.added) == (plain.operators, plain.flops, 0)
    assert lora.operators > plain.operators
    assert all(each.operators > plain.operators for each in others)


def test_the_folder_holds_records_page_and_numbers(measured: tuple[LatencyRecord, Path]) -> None:
    record, out = measured
    assert sorted(p.name for p in out.iterdir()) == ["numbers", RECORDS, REPORT]
    tree = json.loads((out / RECORDS).read_text(encoding="utf-8"))
    assert tree["kind"] == "rankwise latency"
    assert tree["timings"][0]["seconds"] == list(record.timings[0].seconds)
    assert set(tree["versions"]) >= {"python", "torch"}
    assert sorted(p.name for p in (out / "numbers").iterdir()) == ["overhead.csv", "passes.csv"]


class Stopping(Silent):
    """Presses Ctrl+C in the middle."""

    def advance(self, done: int, values: Any) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_latency(options(bert), Sizes((1,), (8,), 3), tmp_path / "out", Stopping())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_is_refused_before_anything_is_measured(
    bert: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="Name another --out"):
        run_latency(options(bert), Sizes((1,), (8,), 3), tmp_path, Stopping())
    with pytest.raises(UserError, match="is a file"):
        run_latency(options(bert), Sizes((1,), (8,), 3), tmp_path / "notes.txt", Stopping())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_working_folder_is_refused_before_anything_is_measured(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the folder this process works in"):
        run_latency(options(bert), Sizes((1,), (8,), 3), Path(), Stopping())


def test_a_length_that_the_model_does_not_take_is_refused(bert: Path) -> None:
    with pytest.raises(UserError, match="takes 64 at most"):
        run_latency(options(bert), Sizes((1,), (8, 65), 3))
