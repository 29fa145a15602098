"""`rankwise advise` as a command: it prints a config that `rankwise fit` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.cli.app import main
from rankwise.train.manifest import read_manifest


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_the_advised_config_trains_with_the_advised_ranks(
    bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "advice"
    words = ["--model", bert, "--data", rows / "train.tsv", "--r", "4", "--lr", "0.01"]
    assert left("advise", *words, "--epochs", "2", "--dtype", "float32", "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"next: rankwise fit --config {out / 'config.yaml'}" in printed
    assert (out / "config.yaml").read_text(encoding="utf-8") in printed
    assert left("fit", "--config", out / "config.yaml") == 0
    advised = [line for line in printed.splitlines() if line.startswith("Advised: ")]
    counted = int(advised[0].split(", ")[1].removesuffix(" parameters").replace(",", ""))
    assert read_manifest(out / "advised")["counts"]["adapter"] == counted


def test_the_folder_and_the_rank_are_checked(
    bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("advise", "--model", bert, "--data", rows / "train.tsv")
    assert left(*words) == 2
    assert "--out FOLDER" in capsys.readouterr().err
    assert left(*words, "--r", "1", "--out", tmp_path / "a") == 2
    assert left(*words, "--method", "full", "--out", tmp_path / "a") == 2
