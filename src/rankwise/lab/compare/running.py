"""run_compare: the grid's runs, some at a time, kept as they are done, and the report of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import (
    ArtifactError,
    EnvironmentFault,
    RankwiseError,
    UserError,
    gather,
    nearest,
)
from rankwise.lab import words
from rankwise.lab.compare.evidence import Evidence, outcome_of, outcomes_of, read_evidence
from rankwise.lab.compare.folder import Pinned, begin, find_rows, pin, read_pinned
from rankwise.lab.compare.grid import Cell
from rankwise.lab.compare.pool import Pool, cores
from rankwise.lab.compare.work import work_of
from rankwise.lab.compare.worker import Ended, Over, Progress, Task
from rankwise.lab.page import can_make_pages
from rankwise.train.folder import claim
from rankwise.train.model import load_config
from rankwise.train.planning import plan_model
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.signals import Interrupted, StopRequest
from rankwise.train.together import likeness

__all__ = ["report_compare", "run_compare"]

_POLL = 1.0  # seconds between two looks at the signals
_LIBRARIES = 1_500_000_000  # bytes that a process holds before the model, generously


def run_compare(
    out: str | Path,
    fit: Mapping[str, Any],
    compared: Mapping[str, Any] | None = None,
    *,
    jobs: int | None = None,
    together: int = 1,
    reporter: Reporter | None = None,
) -> Evidence:
    """Search each method's learning rate, train every setting under every seed, write the report.

    What is finished in ``out`` is not run again, and what was interrupted goes on. The report is
    ``report.html``, its numbers are in ``csv/``; both follow from the records alone.

    The processes that train are started from this one, so that a script that calls this does so
    below ``if __name__ == "__main__":``.

    Args:
        out: folder of the comparison.
        fit: options of ``rankwise fit`` that every run shares; none are needed to go on.
        compared: fields of :class:`rankwise.lab.compare.options.CompareConfig`.
        jobs: processes at a time, with one run each or so many as train ``together``; None for as
            many as there are cores and memory for, and one on a GPU.
        together: the most runs that go through the base in one pass, where they have the same rows,
            batches and seed (:func:`rankwise.train.together.fit_together`).
        reporter: told what happens.

    Raises:
        UserError: options that cannot be used, or that are not those the comparison began with.
        ArtifactError, EnvironmentFault: a run failed, or a file is damaged; each says how to mend
            it. What was finished is kept.
        Interrupted: Ctrl+C or SIGTERM; every run has saved what it had.
    """
    can_make_pages()
    folder, watcher = Path(out), reporter or Silent()
    pinned = begin(folder, fit, compared or {}, watcher)
    _check_reference(pinned)
    size = _plan(pinned) if _State(pinned, watcher).left() else 0
    with claim(folder):
        pin(pinned)
        state = _State(pinned, watcher)
        if state.left():
            find_rows(pinned)
            state.train(_jobs(jobs, size, pinned, state.to_go, watcher), together)
    return report_compare(out)


def report_compare(out: str | Path, reference: str | None = None) -> Evidence:
    """Write the report of what is finished in a comparison's folder, and train nothing.

    Args:
        out: folder of the comparison.
        reference: what the others are compared with in this report, in place of its own.

    Raises:
        UserError: there is no comparison, nothing in it is finished, or no such reference.
        ArtifactError: a file is damaged.
    """
    pinned = read_pinned(Path(out))
    if reference is not None:
        config = pinned.config.model_copy(update={"reference": reference})
        pinned = replace(pinned, config=config)
        _check_reference(pinned)
    evidence = read_evidence(pinned)
    evidence.write()
    return evidence


def _plan(pinned: Pinned) -> int:
    """Try every setting on the model without its weights; returns how many parameters it has.

    Raises:
        UserError: there is no such model, or a method cannot be used on it; all are listed.
    """
    load_config(pinned.given["model"], pinned.given.get("revision"))
    size = 0
    problems: dict[str, list[str]] = {}
    for regime in pinned.grid.regimes():
        config = pinned.grid.run_cell(regime, 1.0, 0).config
        try:
            size = plan_model(config, max(pinned.labels, 1)).counts["base"] or 0
        except RankwiseError as error:
            problems.setdefault(str(error), []).append(regime.key)
    said = [f"{', '.join(keys)}: {problem}" for problem, keys in problems.items()]
    gather(UserError, "These methods cannot be compared on this model", said)
    return size


def _check_reference(pinned: Pinned) -> None:
    """Refuse a reference that is not compared, before hours of work."""
    named = pinned.config.reference
    keys = [regime.key for regime in pinned.grid.regimes()]
    if named is not None and named not in keys:
        raise UserError(
            f"--reference {named} is none of what is compared: {', '.join(keys)}."
            f"{nearest(named, keys)}"
        )


def _jobs(wanted: int | None, size: int, pinned: Pinned, most: int, watcher: Reporter) -> int:
    """How many runs to train at a time: what was wanted, or what cores and memory allow."""
    if wanted is not None:
        return min(wanted, most)
    if pinned.settled["device"] != "cpu":
        return 1
    jobs = cores()
    free, each = _free_memory(), 16 * size + _LIBRARIES
    if free is not None and free // each < jobs:
        jobs = max(1, free // each)
        watcher.note(
            f"{words.count(jobs, 'run')} at a time, as full fine-tuning of this model may hold "
            f"{words.size(each)} and {words.size(free)} are free (--jobs decides otherwise)."
        )
    return min(jobs, most)


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def groups(
    left: Sequence[Cell], free: int, together: int, apart: Collection[str] = ()
) -> Iterator[list[Cell]]:
    """What so many free processes are to do next: the first that is left, with others like it.

    Runs of one :func:`~rankwise.train.together.likeness` are spread over the processes that are
    free, at most so many ``together``; those of a likeness that is to train ``apart`` are not.
    """
    waiting = list(left)
    for process in range(free):
        if not waiting:
            return
        own = likeness(waiting[0].config) if together > 1 else None
        alone = own is None or own in apart
        alike = waiting[:1] if alone else [c for c in waiting if likeness(c.config) == own]
        size = min(together, math.ceil(len(alike) / (free - process)))
        yield alike[:size]
        waiting = [cell for cell in waiting if cell not in alike[:size]]


class _State:
    """The grid as it fills."""

    def __init__(self, pinned: Pinned, watcher: Reporter) -> None:
        self.pinned, self.grid, self.watcher = pinned, pinned.grid, watcher
        self.outcomes = outcomes_of(self.grid, pinned.metric)
        self.work = work_of(self.grid, self.outcomes, pinned.metric)
        self.under_way: dict[str, tuple[Cell, float]] = {}  # with the share that is done
        self.apart: set[str] = set()  # the likenesses of runs that cannot train together
        self.shown = 0  # the total of the progress that is shown
        self.heard = False

    @property
    def to_go(self) -> int:
        """How many runs are to come, those that wait for others among them."""
        return self.work.count - len(self.outcomes)

    def left(self) -> list[Cell]:
        """The runs that can be begun or gone on with now."""
        return [c for c in self.work.left(self.outcomes) if c.name not in self.under_way]

    def train(self, jobs: int, together: int) -> None:
        """Train until nothing is left."""
        # torch's own number holds as a limit, so that OMP_NUM_THREADS does
        threads = min(torch.get_num_threads(), max(1, cores() // jobs))
        work = self.work
        with StopRequest(self.watcher.note) as stop, Pool() as pool:
            each = f", each with up to {together} runs in one pass" if together > 1 else ""
            self.watcher.note(
                f"{self.to_go} of {words.count(work.count, 'run')} are left, "
                f"searches included; {jobs} at a time{each}, {words.count(threads, 'thread')} each."
            )
            self._show(begin=True)
            try:
                while len(pool) or self.left():
                    if stop.number is not None:
                        self._wait(pool)
                        raise Interrupted(stop.number, f"rankwise compare --out {self.grid.folder}")
                    for cells in groups(self.left(), jobs - len(pool), together, self.apart):
                        pool.start(self._task(cells, threads))
                        self.under_way |= {cell.name: (cell, 0.0) for cell in cells}
                    for task, message in pool.messages(_POLL):
                        self._take(task, message, pool)
            finally:
                self.watcher.finish()

    def _task(self, cells: Sequence[Cell], threads: int) -> Task:
        name = cells[0].name
        log = self.grid.folder / "logs" / f"{name.replace('/', '-')}.log"
        runs = {cell.name: cell.config for cell in cells}
        return Task(runs, threads, log, keep=name.startswith("runs/"))

    def _take(self, task: Task, message: Progress | Over | Ended, pool: Pool) -> None:
        """Note what a task tells.

        Raises:
            RankwiseError: it failed; the others have saved what they had.
        """
        if isinstance(message, Progress):
            for name in self.under_way.keys() & task.runs.keys():
                cell, _ = self.under_way[name]
                self.under_way[name] = (cell, message.done / max(message.total, 1))
            # the time until the first word is that of the libraries, and says nothing of the rest
            self._show(begin=not self.heard)
            self.heard = True
        elif isinstance(message, Over):
            self._finished(message)
        else:
            for name in task.runs:
                self.under_way.pop(name, None)
            if message.how == "apart":
                self.apart |= {str(likeness(config)) for config in task.runs.values()}
                self.watcher.note(f"{task.name} train one by one: {message.message}")
            elif message.how == "failed":
                self.watcher.note(f"{task.name} failed; the other runs save what they have.")
                self._wait(pool)
                self._fail(task, message)

    def _finished(self, message: Over) -> None:
        name = message.name
        cell, _ = self.under_way.pop(name)
        outcome = outcome_of(self.grid.folder / name, cell, self.pinned.metric)
        if outcome is None:
            raise ArtifactError(f"'{self.grid.folder / name}' lost its record.")
        metric = self.pinned.metric
        self.outcomes[name] = outcome
        self.work = work_of(self.grid, self.outcomes, metric)
        said = f"{metric} {words.score(metric, outcome.score)}"
        if message.diverged:
            said = "diverged: its loss or gradients were no finite numbers any more"
        self.watcher.note(f"[{len(self.outcomes)}/{self.work.count}] {name}: {said}")
        self._show(begin=self.work.expected != self.shown)

    def _wait(self, pool: Pool) -> None:
        """Ask all to stop, and wait until they have saved."""
        pool.stop()
        while len(pool):
            for task, message in pool.messages(_POLL):
                if isinstance(message, Over):
                    self._finished(message)
                elif isinstance(message, Ended):
                    for name in task.runs:
                        self.under_way.pop(name, None)

    def _show(self, *, begin: bool = False) -> None:
        """Tell how far the whole grid is."""
        done = sum(cell.cost for cell in self.work.cells if cell.name in self.outcomes)
        done += sum(int(cell.cost * share) for cell, share in self.under_way.values())
        if begin:
            self.watcher.finish()
            self.shown = self.work.expected
            self.watcher.start("compare", self.shown, done)
        self.watcher.advance(done, {"runs": len(self.outcomes), "of": self.work.count})

    def _fail(self, task: Task, message: Ended) -> None:
        kinds = {2: UserError, 3: ArtifactError, 4: EnvironmentFault}
        kind = kinds.get(message.exit_code, RankwiseError)
        raise kind(
            f"{task.name} failed: {message.message} Its log is '{task.log}'. What is "
            f"finished is kept; go on with: rankwise compare --out {self.grid.folder}"
        )
