"""Processes that train a run or a few each, some at a time, and what they tell."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType

from rankwise.lab.compare.worker import Ended, Over, Progress, Task, work

__all__ = ["Pool", "cores"]

# What every run imports. The processes are copies of one that has imported it already, which takes
# it off each run; where the system cannot copy a process, each imports for itself.
_PRELOADED = [
    "rankwise.lab.compare.worker",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "scipy.stats",
    "sklearn.metrics",
]


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class _Running:
    task: Task
    process: BaseProcess
    pipe: Connection


class Pool:
    """Runs tasks in processes of their own; leaving the block ends those that still run.

    Each task has a process to itself: what memory a run held can be told where it is alone there,
    and what ends one, such as the system when memory runs out, ends no other.
    """

    def __init__(self) -> None:
        method = "forkserver" if sys.platform != "win32" else "spawn"
        self._context = multiprocessing.get_context(method)
        self._running: dict[Connection, _Running] = {}
        if method == "forkserver":
            self._context.set_forkserver_preload(_PRELOADED)
            _start_copied()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for running in self._running.values():
            running.process.kill()
        for running in self._running.values():
            running.process.join()
            running.pipe.close()
        self._running.clear()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, task: Task) -> None:
        """Begin a task."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work, args=(task, theirs), name=task.name)
        process.start()
        theirs.close()
        self._running[ours] = _Running(task, process, ours)

    def stop(self) -> None:
        """Ask every task to save what it has and end."""
        for running in self._running.values():
            if running.process.is_alive() and running.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running.process.pid, signal.SIGTERM)

    def messages(self, seconds: float) -> Iterator[tuple[Task, Progress | Over | Ended]]:
        """What the tasks tell, within so many seconds; a task's last message is an ``Ended``."""
        for pipe in wait(list(self._running), timeout=seconds):
            assert isinstance(pipe, Connection)
            running = self._running[pipe]
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = self._without_a_word(running)
            if isinstance(message, Ended):
                running.process.join()
                pipe.close()
                del self._running[pipe]
            yield running.task, message

    @staticmethod
    def _without_a_word(running: _Running) -> Ended:
        """How a process ended that did not say it itself."""
        running.process.join()
        code = running.process.exitcode or 0
        if code == -signal.SIGTERM:
            return Ended("stopped")
        by = f"signal {-code}" if code < 0 else f"exit code {code}"
        why = (
            ", as when memory runs out; fewer --jobs, or less --together, need less"
            if code == -signal.SIGKILL
            else ""
        )
        return Ended("failed", f"its process was ended by {by}{why}.", 4)


def _start_copied() -> None:
    """Start the process that is copied, so that Ctrl+C does not reach it, nor its copies.

    Ctrl+C goes to every process of a terminal. The parent answers it; the process that is copied
    must not die of it while it imports. A process inherits what its parent has blocked; the tracker
    of resources is started first, as it would lift the block.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
