"""`rankwise inspect` as a command; what it computes is tested in tests/lab/inspecting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise.cli.app import main


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *map(str, words)])
    return int(caught.value.code or 0)


def test_the_table_has_a_row_for_each_layer(
    finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = finished("single")
    assert left(run, "--with", run / "last", "--out", tmp_path / "seen") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if ".attention.self." in line]
    assert [row.split()[0] for row in rows][:2] == [
        "0.attention.self.query",
        "0.attention.self.value",
    ]
    assert "‖δ‖/‖W0‖" in lines[0]
    assert "φ reads" in lines[0]
    assert lines[-1] == f"report: {tmp_path / 'seen' / 'report.html'}"
    assert any(line.startswith("next: rankwise trim") for line in lines)


def test_json_is_the_record(
    finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert left(finished("single"), "--json", "--out", tmp_path / "seen") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "seen" / "inspection.json").read_text("utf-8"))
    assert len(printed["layers"]) == 4


def test_another_method_has_no_singular_values(
    finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert left(finished("head")) == 2
    assert "another method than LoRA" in capsys.readouterr().err


def test_a_missing_adapter_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert left("nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
