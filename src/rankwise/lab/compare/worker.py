"""Runs of a grid in a process of their own: trained, tidied, and told about through a pipe."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.io import files
from rankwise.lab.run_files import EVENTS
from rankwise.train import manifest as record
from rankwise.train.config import FitConfig
from rankwise.train.loop import Diverged
from rankwise.train.run import FitResult
from rankwise.train.signals import Interrupted
from rankwise.train.together import Apart, fit_together

__all__ = ["SPECTRA", "Ended", "Over", "Progress", "Task", "thin_log", "work"]

SPECTRA = "spectra.json"
_SECONDS = 0.5  # between two messages about progress


@dataclass(frozen=True)
class Task:
    """What a process is to do.

    Attributes:
        runs: the options of its runs by their names; several train together.
        threads: for torch to use.
        log: the file that takes what libraries print.
        keep: whether what was learned is kept; the record is kept in any case.
    """

    runs: Mapping[str, FitConfig]
    threads: int
    log: Path
    keep: bool

    @property
    def name(self) -> str:
        """The names of its runs."""
        return ", ".join(self.runs)


@dataclass(frozen=True)
class Progress:
    """How far the training is: optimiser steps done, of how many."""

    done: int
    total: int


@dataclass(frozen=True)
class Over:
    """A run of the task is finished, or has diverged."""

    name: str
    diverged: bool


@dataclass(frozen=True)
class Ended:
    """How a process ended: "finished", "stopped", "apart" where its runs cannot train together and
    none was begun, or "failed" with an error.

    ``exit_code`` is the error's, 1 for a fault in Rankwise.
    """

    how: str
    message: str = ""
    exit_code: int = 0


def work(task: Task, pipe: Connection) -> None:
    """Carry out a task and tell of each run that is over; the last message is an :class:`Ended`."""
    _settle_in(task)
    try:
        _fit(task, pipe)
        ended = Ended("finished")
    except (Interrupted, KeyboardInterrupt):
        ended = Ended("stopped")
    except Apart as error:
        ended = Ended("apart", str(error))
    except RankwiseError as error:
        ended = Ended("failed", str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001 (told to the parent, the traceback to the log)
        traceback.print_exc()
        ended = Ended("failed", f"{type(error).__name__}: {error}", 1)
    with contextlib.suppress(OSError):
        pipe.send(ended)
    pipe.close()


def _settle_in(task: Task) -> None:
    """Leave the terminal's signals to the parent, print into the log, take the threads."""
    import torch

    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(handle, number)
    os.close(handle)
    torch.set_num_threads(task.threads)


def _fit(task: Task, pipe: Connection) -> None:
    """Train the runs, or go on with them."""
    names = {config.out: name for name, config in task.runs.items()}

    def ended(config: FitConfig, result: FitResult | Diverged) -> None:
        if len(names) == 1:  # it counts as over; what is kept of it, too
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(result, FitResult):
            _tidy(result, config, task.keep)
        _send(pipe, Over(names[config.out], isinstance(result, Diverged)))

    configs = list(task.runs.values())
    fit_together(configs, ended, resume=_begun(configs), reporter=_Sender(pipe))


def _begun(configs: Sequence[FitConfig]) -> list[str]:
    """The folders of the runs that can be gone on with; the others are emptied."""
    folders: list[str] = []
    for config in configs:
        if _can_go_on(Path(config.out), config):
            folders.append(config.out)
        else:
            shutil.rmtree(config.out, ignore_errors=True)
    return folders


def _tidy(result: FitResult, config: FitConfig, keep: bool) -> None:
    """Leave of a finished run what is asked."""
    shutil.rmtree(result.folder / "checkpoints", ignore_errors=True)
    thin_log(result.folder / EVENTS)
    if not keep:
        shutil.rmtree(result.folder / "adapter", ignore_errors=True)
    elif config.method == "lora":
        files.write_json(result.folder / SPECTRA, _spectra(result))


def _can_go_on(folder: Path, config: FitConfig) -> bool:
    """Whether a run was begun here that can be continued rather than begun again.

    It has a checkpoint, which a folder that came with a clone has not, and was begun by a version
    that has the same options.
    """
    if not (folder / record.NAME).exists() or not (folder / "checkpoints").is_dir():
        return False
    return record.read_manifest(folder)["config"].keys() == config.model_dump().keys()


def thin_log(path: Path, most: int = 200) -> None:
    """Leave at most so many training entries in a log: each the mean loss of the steps up to it.

    The other entries, those of evaluations, stay as they are.
    """
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    training = [number for number, event in enumerate(events) if event["event"] == "train"]
    width = max(1, math.ceil(len(training) / most))
    ends = {*training[width - 1 :: width], *training[-1:]}
    kept: list[dict[str, Any]] = []
    losses: list[float] = []
    for number, event in enumerate(events):
        if event["event"] == "train":
            losses.append(math.nan if event["loss"] is None else event["loss"])
            if number not in ends:
                continue
            mean = sum(losses) / len(losses)
            event["loss"] = mean if math.isfinite(mean) else None
            losses.clear()
        kept.append(event)
    files.write_text(path, "".join(json.dumps(event) + "\n" for event in kept))


def _spectra(result: FitResult) -> dict[str, list[float]]:
    """The singular values of every update that was learned."""
    from rankwise.methods.adapter import adapter_of

    factors = adapter_of(result.model).factors
    return {name: each.singular_values().flatten().tolist() for name, each in factors.items()}


class _Sender:
    """A reporter that tells the parent how far the training is, and stops when nobody listens."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._total = 0
        self._sent = 0.0

    def note(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")

    def start(self, what: str, total: int, done: int = 0) -> None:
        if what == "training":
            self._total = total

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        del values
        if self._total and time.monotonic() - self._sent >= _SECONDS:
            self._sent = time.monotonic()
            _send(self._pipe, Progress(done, self._total))

    def finish(self) -> None:
        pass


def _send(pipe: Connection, message: Any) -> None:
    try:
        pipe.send(message)
    except OSError:  # the parent is gone: save and stop
        signal.raise_signal(signal.SIGTERM)
