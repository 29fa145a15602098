"""`rankwise plan`: the table and the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.cli.app import main


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


def test_the_table_and_the_json_agree(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "--model", bert, "--r", "4", "--target-modules", "query,value")
    assert left(*words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [layer["name"].rpartition(".")[2] for layer in plan["layers"]] == ["query", "value"] * 2
    assert all(layer["parameters"] == 4 * (32 + 32) for layer in plan["layers"])
    assert plan["counts"]["adapter"] == 4 * 4 * 64
    assert left(*words) == 0
    shown = capsys.readouterr().out
    for layer in plan["layers"]:
        line = next(row for row in shown.splitlines() if row.startswith(layer["name"] + " "))
        assert line.split()[1:] == ["Linear", "32", "x", "32", "4", "8", "256"]
    assert f"{plan['counts']['trainable']:,} of {plan['counts']['base']:,} train" in shown


def test_a_target_without_a_match_names_what_there_is(
    bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left("plan", "--model", bert, "--target-modules", "qury") == 2
    assert "Did you mean 'query'" in capsys.readouterr().err
