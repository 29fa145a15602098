"""`rankwise advise` as a command: it prints a config that `rankwise fit` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.cli.app import main
from rankwise.lab.advising.options import FIRST_R, TUNING_SHARE
from rankwise.train.manifest import read_manifest


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_the_config_of_an_advice_trains_with_its_ranks(
    bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "advice"
    words = ["--model", bert, "--data", rows / "train.tsv", "--r", "4", "--lr", "0.01"]
    words += ["--eval-fraction", "0.25"]
    assert left("advise", *words, "--epochs", "2", "--dtype", "float32", "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"next: rankwise fit --config {out / 'config.yaml'}" in printed
    assert (out / "config.yaml").read_text(encoding="utf-8") in printed
    assert left("fit", "--config", out / "config.yaml") == 0
    record = json.loads((out / "advice.json").read_text(encoding="utf-8"))
    assert record["rows"] == round(48 * 0.25)
    chosen = record["chosen"]  # nothing where ten rows tell no gain: then the probe's own rank
    assert ("Advised: " in printed) == (chosen is not None)
    assert ("No rank is advised" in printed) == (not record["gained"])
    wanted = record["probe_parameters"] if chosen is None else chosen["parameters"]
    assert read_manifest(out / "advised")["counts"]["adapter"] == wanted


def test_the_help_says_the_share_and_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert left("advise", "--help") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{TUNING_SHARE:g} when not given" in said
    assert f"when not given {FIRST_R}, and twice that" in said


def test_the_folder_and_the_rank_are_checked(
    bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("advise", "--model", bert, "--data", rows / "train.tsv")
    assert left(*words) == 2
    assert "--out FOLDER" in capsys.readouterr().err
    assert left(*words, "--r", "1", "--out", tmp_path / "a") == 2
    assert left(*words, "--method", "full", "--out", tmp_path / "a") == 2
