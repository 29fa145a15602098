"""`rankwise predict`: JSON lines, tables, metrics."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise.cli.app import main


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


def test_texts_give_json_lines(
    finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert left("predict", finished("single"), "--text", "good film", "--text", "bad film") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["row"] for row in rows] == [1, 2]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    assert all(
        row["label"] == max(row["probabilities"], key=row["probabilities"].get) for row in rows
    )


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_a_file_gives_a_table_and_metrics(
    finished: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    suffix: str,
    delimiter: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = finished("single")
    out = tmp_path / f"predictions.{suffix}"
    assert left("predict", run, "--data", rows / "dev.tsv", "--out", out) == 0
    with out.open(newline="") as stream:
        table = list(csv.DictReader(stream, delimiter=delimiter))
    with (rows / "dev.tsv").open(newline="") as stream:
        labels = [row["label"] for row in csv.DictReader(stream, delimiter="\t")]
    right = sum(row["label"] == label for row, label in zip(table, labels, strict=True))
    assert f"{len(labels)} rows: accuracy {right / len(labels):.4f}" in capsys.readouterr().out
    assert list(table[0]) == ["row", "label", "probability_0", "probability_1"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "either --text"),
        (("--text", "a", "--data", "b.tsv"), "either --text"),
        (("--text", "a", "--pair", "b"), "--pair"),
        (("--text", "  "), "empty"),
        (("--text", "a", "--device", "gpu"), "--device"),
        (("--data", "dev.tsv", "--out", "x.xlsx"), ".jsonl"),
    ],
)
def test_mistakes_are_told(
    finished: Callable[[str], Path],
    words: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert left("predict", finished("single"), *words) == 2
    assert told in capsys.readouterr().err


def test_a_language_model_goes_on_with_the_text(
    finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("predict", finished("gpt2"), "--text", "the film was", "--max-new-tokens", "5")
    assert left(*words) == 0
    first = capsys.readouterr().out
    assert isinstance(json.loads(first)["generated"], str)
    assert left(*words) == 0
    assert capsys.readouterr().out == first


def test_metrics_say_how_many_rows_they_are_over(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "some.tsv"
    data.write_text("sentence\tlabel\ngood film\t1\nbad film\t-\nold house\t0\n")
    assert left("predict", finished("single"), "--data", data) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["row"] for line in out.splitlines()] == [1, 2, 3]
    assert "1 of 3 rows have no known label" in err
    assert "2 of 3 rows: accuracy" in err
