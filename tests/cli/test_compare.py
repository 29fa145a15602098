"""`rankwise compare` as a command; what it computes is tested in tests/lab/compare."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.cli.app import main


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_flags_train_and_say_what_was_found(
    bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--data", rows / "train.tsv", "--eval", rows / "dev.tsv", "--model", bert]
    grid = ["--methods", "head,lora", "--ranks", "1", "--seeds", "1", "--rates", "1"]
    out = tmp_path / "out"
    common = ["--epochs", "1", "--jobs", "1", "--device", "cpu", "--out", out]
    assert left("compare", *files, *grid, *common) == 0
    told = capsys.readouterr()
    assert told.out.startswith("method")
    assert "LoRA r=1" in told.out
    assert f"report: {out / 'report.html'}" in told.out
    assert "2 of 2 runs are left" in told.err
    assert "[2/2] runs/lora-r1-lr0.001-seed0: accuracy" in told.err
    assert (out / "csv" / "methods.csv").exists()
    assert left("compare", "--out", out, "--rates", "3") == 2
    assert "--rates was 1 and is now 3" in capsys.readouterr().err
    (tmp_path / "same.yaml").write_text(f"out: {out}\nmethods: [head, lora]\nepochs: 1\n")
    for again in (["--config", tmp_path / "same.yaml"], ["--out", out, "--report-only"]):
        assert left("compare", *again) == 0
        assert capsys.readouterr().out == told.out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no groups of processes to signal")
def test_ctrl_c_in_a_terminal_reaches_every_process_and_ends_them_quietly(
    bert: Path, rows: Path, tmp_path: Path
) -> None:
    words = ["compare", "--data", rows / "train.tsv", "--model", bert, "--out", tmp_path / "out"]
    more = ["--methods", "head", "--seeds", "1", "--epochs", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "rankwise", *map(str, words), *more]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    while "runs are left" not in process.stderr.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert f"Go on with: rankwise compare --out {tmp_path / 'out'}" in told


def test_mistakes_are_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert left("compare", "--out", tmp_path / "a", "--methods", "lora") == 2
    assert "model (--model) is required" in capsys.readouterr().err
    assert left("compare", "--out", tmp_path / "a", "--lr", "1") == 2
    assert "--lr" in capsys.readouterr().err
    assert left("compare", "--model", "m") == 2
    assert "--out is required" in capsys.readouterr().err
    (tmp_path / "wrong.yaml").write_text("out: a\nmodel: m\ndata: d\nrank: 3\n")
    assert left("compare", "--config", tmp_path / "wrong.yaml") == 2
    assert "'rank' is no option. Did you mean 'ranks'" in capsys.readouterr().err
    assert left("compare", "--out", tmp_path / "a", "--report-only") == 2
    assert "holds no comparison" in capsys.readouterr().err
    report = ("compare", "--out", tmp_path / "a", "--report-only")
    assert left(*report, "--seeds", "4", "--jobs", "2") == 2
    assert "--report-only trains nothing, so leave out --seeds, --jobs." in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
