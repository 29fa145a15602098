"""Exit codes, messages and help of the command as a user meets them, in processes of their own."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import rankwise
from rankwise.cli.app import COMMANDS, main


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command in this process and say how it left."""

    def run(*words: str | Path) -> SimpleNamespace:
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def rankwise_process(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rankwise", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_version_is_the_packages() -> None:
    done = rankwise_process("--version")
    assert (done.returncode, done.stdout.strip()) == (0, rankwise.__version__)


def test_without_words_it_shows_the_help_and_every_command() -> None:
    done = rankwise_process()
    assert "Usage" in done.stdout + done.stderr
    assert all(name in done.stdout + done.stderr for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(call: Callable[..., SimpleNamespace], command: str) -> None:
    done = call(command, "--help")
    assert done.code == 0
    assert "Usage" in done.out
    assert "--out" in done.out or command in ("count", "estimate", "plan")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_list_says_what_the_commands_own_help_says(command: str) -> None:
    text = importlib.import_module(f"rankwise.cli.{command}").command.__doc__
    first = " ".join(text.split("\n\n")[0].split())
    assert COMMANDS[command] == first


def test_an_unknown_command_names_the_nearest(call: Callable[..., SimpleNamespace]) -> None:
    done = call("frit")
    assert done.code == 2
    assert "'frit'" in done.err
    assert "fit" in done.err


def test_an_unknown_flag_is_a_mistake_of_the_user(call: Callable[..., SimpleNamespace]) -> None:
    done = call("fit", "--batchsize", "8")
    assert done.code == 2
    assert "--batchsize" in done.err


def test_a_mistake_leaves_with_2_and_no_traceback() -> None:
    done = rankwise_process("fit", "--model", "nowhere/at/all", "--data", "x", "--out", "y")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "nowhere/at/all" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    done = rankwise_process("predict", "no-such-run", "--text", "a", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "UserError" in done.stderr


def test_a_damaged_file_leaves_with_3(
    call: Callable[..., SimpleNamespace], finished: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished("single"), run)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    done = call("predict", run, "--text", "good")
    assert done.code == 3
    assert "adapter_model.safetensors" in done.err


def test_what_the_machine_lacks_leaves_with_4(
    call: Callable[..., SimpleNamespace], bert: Path, rows: Path, tmp_path: Path
) -> None:
    import torch

    device = "mps" if torch.cuda.is_available() else "cuda"
    out = tmp_path / "run"
    done = call(
        "fit", "--model", bert, "--data", rows / "dev.tsv", "--device", device, "--out", out
    )
    assert done.code == 4
    assert device in done.err
    assert not out.exists()


def test_a_closed_pipe_is_no_fault(finished: Callable[[str], Path], rows: Path) -> None:
    words = [sys.executable, "-m", "rankwise", "predict", str(finished("single"))]
    words += ["--data", str(rows / "train.tsv")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read().decode()
    assert "Traceback" not in told
    assert "fault in Rankwise" not in told


def test_help_shows_what_a_flag_takes_and_whole_paragraphs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for words in (["--help"], ["combine", "--help"], ["fit", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        shown = capsys.readouterr().out
        assert not re.search(r"--\S+ .*<(bool|int|float|str)", shown)
    assert (
        "rankwise fit --model bert-base-uncased --data train.tsv --eval dev.tsv --r 8 --target"
        in (" ".join(shown.split()))
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_and_leaves_with_its_code(
    call: Callable[..., SimpleNamespace], tmp_path: Path, number: signal.Signals
) -> None:
    """While it waits for a config file that never comes."""
    os.mkfifo(tmp_path / "run.yaml")
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    done = call("fit", "--config", tmp_path / "run.yaml")
    assert done.code == 128 + number
    assert done.err.strip() == "Stopped."
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
