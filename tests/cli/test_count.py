"""`rankwise count`: the table and the same as JSON."""

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
    words = ("count", bert / "config.json", "--r", "4", "--target-modules", "query,value")
    assert left(*words, "--labels", "3", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert [each["method"] for each in made["methods"]][:3] == ["lora", "head", "full"]
    assert made["methods"][0]["adapter"] == 2 * 2 * 4 * (32 + 32)
    assert made["methods"][0]["head"] == 32 * 3 + 3
    assert left(*words, "--labels", "3") == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert f"{made['base']:,} parameters, its head among them" in lines[0]
    for method in made["methods"]:
        line = next(row for row in lines if row.startswith(method["name"] + " "))
        assert f" {method['trained']:,} " in line
    assert "4 adapted layers of 32 x 32, r = 4: 256 in each in place of 1,024, 4 times fewer." in (
        shown
    )


def test_one_method_can_be_asked_for(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert left("count", bert, "--method", "head", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in made["methods"]] == ["head-only"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--target-modules", "qury"), "Did you mean 'query'"),
        (("--rnk", "8"), "--rnk"),
        (("--r", "0"), "--r"),
        (("--labels", "0"), "--labels"),
    ],
)
def test_mistakes_leave_with_2(
    bert: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    assert left("count", bert, *words) == 2
    assert told in capsys.readouterr().err


def test_a_model_that_is_not_there_leaves_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left("count", tmp_path / "nothing.json") == 2
    assert "nothing.json" in capsys.readouterr().err
