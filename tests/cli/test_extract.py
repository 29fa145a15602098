"""`rankwise extract` as a command; what it computes is tested in tests/train/test_extracting.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise.cli.app import main
from rankwise.train.export import merge_run


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["extract", *map(str, words)])
    return int(caught.value.code or 0)


def test_the_table_says_how_much_of_the_change_is_held(
    finished: Callable[[str], Path],
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    merge_run(finished("single"), tmp_path / "merged")
    assert left(bert, tmp_path / "merged", "--r", "2", "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if ".attention.self." in line]
    assert len(rows) == 4
    assert all(row[-1] == "exact" for row in rows)
    assert any(line.startswith("4 linear layers differ; ") for line in lines)
    assert any(line.startswith("saved whole, 66 parameters: classifier") for line in lines)
    assert lines[-1] == f"adapter: {tmp_path / 'out'}"


def test_where_only_biases_differ_nothing_is_said_of_updates(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BertModel

    model = BertModel.from_pretrained(bert)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 if name.endswith("query.bias") else 0
    model.save_pretrained(tmp_path / "bitfit")
    capsys.readouterr()
    assert left(bert, tmp_path / "bitfit", "--r", "2", "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("0 linear layers differ; ")
    assert told[1:] == [
        "2 biases differ; each is held exactly beside its update.",
        f"adapter: {tmp_path / 'out'}",
    ]


def test_neither_rank_nor_energy_is_a_mistake(
    bert: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert left(bert, bert, "--out", tmp_path / "out") == 2
    assert "--r 16 or --energy 0.9" in capsys.readouterr().err
