"""Comparisons whose runs go through the base in one pass come to what they come to run by run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwise.lab.compare.running import groups, run_compare

SMALL = {"methods": "head,lora", "ranks": "1,2", "seeds": 2, "widen": 0, "search_rank": 2}


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    found = [*folder.glob("runs/*/manifest.json"), *folder.glob("search/*/manifest.json")]
    return {str(path.parent.relative_to(folder)): json.loads(path.read_text()) for path in found}


def test_the_same_comparison_in_fewer_passes(compared, given, tmp_path, witness):
    found = run_compare(tmp_path / "out", given(), SMALL, jobs=1, together=4, reporter=witness)
    ours, apart = manifests(tmp_path / "out"), manifests(compared.pinned.folder)
    assert ours.keys() == apart.keys()
    for name, one in ours.items():
        assert one["metrics"] == pytest.approx(apart[name]["metrics"], rel=1e-3), name
    shared = {name: one["together"] for name, one in ours.items()}
    assert {n: k for n, k in shared.items() if k == 1} == {
        "runs/head-lr0.01-seed0": 1,  # no other run of its method has its seed
        "runs/head-lr0.01-seed1": 1,
    }
    assert {k for n, k in shared.items() if n.startswith("search/")} == {3}
    assert {k for n, k in shared.items() if n.startswith("runs/lora")} == {2}
    assert any("each with up to 4 runs in one pass" in note for note in witness.notes)
    assert len([note for note in witness.notes if note.startswith("[")]) == 6 + 6
    said = "4 of the 6 runs went through the base together with others, 2 in one process"
    assert said in found.report.read_text()
    assert said in found.summary()
    assert said not in compared.summary()


def test_runs_alike_are_spread_over_the_processes_that_are_free(options, tmp_path):
    def cell(number: int, **more: Any) -> Any:
        config = options(tmp_path / str(number), r=number + 1, **more)
        return SimpleNamespace(name=f"{number}", config=config)

    like = [cell(i) for i in range(5)]
    other = [cell(5, seed=1), cell(6, dropout=0.1), cell(7, dropout=0.1), cell(8, method="full")]

    def made(free: int, together: int) -> list[str]:
        return ["".join(c.name for c in g) for g in groups([*like, *other], free, together)]

    assert made(1, 1) == ["0"]
    assert made(3, 1) == ["0", "1", "2"]
    assert made(1, 8) == ["01234"]
    assert made(1, 3) == ["012"]
    assert made(2, 8) == ["012", "34"]  # rather than one process with all and one with little
    assert made(9, 8) == ["0", "1", "2", "3", "4", "5", "6", "7", "8"]
    assert made(5, 3)[:2] == ["0", "1"]
    assert made(0, 3) == []
