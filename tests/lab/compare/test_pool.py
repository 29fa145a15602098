"""Processes that really train: how they end, what they leave, and that one does not end another."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise.lab.compare.pool import Pool, cores
from rankwise.lab.compare.worker import SPECTRA, Ended, Over, Progress, Task
from rankwise.train.config import FitConfig


@pytest.fixture
def task(tmp_path: Path, options: Callable[..., FitConfig]) -> Callable[..., Task]:
    """Makes tasks; a long one takes minutes when nobody stops it."""

    def make(name: str, *, keep: bool = True, long: bool = False, **more: object) -> Task:
        steps = {"epochs": 10_000, "eval_every": 10**9} if long else {}
        config = options(tmp_path / name, select="last", **steps, **more)
        return Task({name: config}, 1, tmp_path / "logs" / f"{name}.log", keep)

    return make


def ends(pool: Pool, seconds: float = 120, over: list[Over] | None = None) -> dict[str, Ended]:
    """How every task of a pool ends; runs that are over are added to a list."""
    found: dict[str, Ended] = {}
    until = time.monotonic() + seconds
    while len(pool) and time.monotonic() < until:
        for one, message in pool.messages(0.5):
            if isinstance(message, Ended):
                found[one.name] = message
            elif isinstance(message, Over) and over is not None:
                assert message.name in one.runs
                over.append(message)
    assert not len(pool)
    return found


def begun(pool: Pool, seconds: float = 120) -> int:
    """The process of the task that is first heard to train."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for one, message in pool.messages(0.5):
            assert isinstance(message, Progress), message
            assert 0 < message.done < message.total
            return int((folder_of(one) / "run.lock").read_text())
    raise AssertionError("nothing was heard")


def folder_of(one: Task) -> Path:
    """The folder of a task's only run."""
    (config,) = one.runs.values()
    return Path(config.out)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_runs_end_and_leave_what_is_kept(task) -> None:
    with Pool() as pool:
        pool.start(task("kept"))
        pool.start(task("searched", keep=False))
        pool.start(task("wrong", data="nowhere.tsv"))
        pool.start(task("wild", lr=1e30, max_skipped=2, max_grad_norm=1e30))
        assert len(pool) == 4
        over: list[Over] = []
        found = ends(pool, over=over)
    how = {name: (end.how, end.exit_code) for name, end in found.items()}
    assert how["kept"] == how["searched"] == ("finished", 0)
    assert how["wrong"] == ("failed", 2)
    assert "nowhere.tsv" in found["wrong"].message
    assert how["wild"] == ("finished", 0)
    assert {(o.name, o.diverged) for o in over} == {
        *(("kept", False), ("searched", False), ("wild", True)),
    }
    one, two = (folder_of(task(name)) for name in ("kept", "searched"))
    assert {"adapter", SPECTRA, "answers.safetensors"} <= {p.name for p in one.iterdir()}
    assert {"manifest.json", "answers.safetensors"} <= {p.name for p in two.iterdir()}
    assert not [p for p in (*one.iterdir(), *two.iterdir()) if p.name in ("checkpoints", "last")]
    assert not (two / "adapter").exists()
    spectra = json.loads((one / SPECTRA).read_text())
    assert len(spectra) == 4
    assert all(len(values) == 2 for values in spectra.values())
    manifest = json.loads((one / "manifest.json").read_text())
    assert manifest["memory"]["of"] == "process"
    assert manifest["hardware"]["threads"] == 1
    assert "classifier" in task("kept").log.read_text()  # the run's own notes


def test_a_run_that_is_stopped_goes_on_where_it_was(task) -> None:
    with Pool() as pool:
        long = task("long", long=True, save_minutes=1000)
        pool.start(long)
        begun(pool)
        pool.stop()
        assert ends(pool)["long"] == Ended("stopped")
    folder = folder_of(long)
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    assert list((folder / "checkpoints").iterdir())
    with Pool() as pool:
        pool.start(long)
        begun(pool)
        pool.stop()
        assert ends(pool)["long"] == Ended("stopped")
    assert "Going on from step" in long.log.read_text()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_one_that_is_killed_ends_no_other_and_none_outlives_the_pool(task) -> None:
    with Pool() as pool:
        pool.start(task("killed", long=True))
        first = begun(pool)
        pool.start(task("other"))
        os.kill(first, signal.SIGKILL)
        found = ends(pool)
        assert found["other"].how == "finished"
        assert found["killed"].how == "failed"
        assert found["killed"].exit_code == 4
        assert "signal 9" in found["killed"].message
        pool.start(task("left", long=True))
        last = begun(pool)
        assert alive(last)
    assert not alive(last)


def test_there_is_a_core() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
