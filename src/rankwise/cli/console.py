"""What the terminal shows: notes, progress with time left, tables and errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rankwise.train.reporter import Reporter

__all__ = ["fail", "make_reporter", "table"]

_LINE_SECONDS = 10.0


def fail(message: str) -> None:
    """Print an error on the error stream."""
    print(f"Error: {message}", file=sys.stderr)


def make_reporter() -> Reporter:
    """A live progress bar on a terminal, a line every ten seconds anywhere else."""
    return Bar() if sys.stderr.isatty() else Lines()


def _figures(values: Mapping[str, float]) -> str:
    return "  ".join(f"{k} {v:.4g}" for k, v in values.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Lines:
    """Progress as plain lines on the error stream."""

    def __init__(self) -> None:
        self._what, self._total, self._first = "", 0, 0
        self._began = self._shown = time.monotonic()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._first = what, total, done
        self._began = self._shown = time.monotonic()

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._shown < _LINE_SECONDS:
            return
        self._shown = now
        left = (now - self._began) / max(1, done - self._first) * (self._total - done)
        self.note(
            f"{self._what} {done}/{self._total}  {_figures(values)}  {_clock(left)} left".replace(
                "    ", "  "
            )
        )

    def finish(self) -> None:
        pass


class Bar:
    """Progress as a bar on a terminal."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        self._make = progress.Progress
        self._bar: Any = None
        self._task: Any = None

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._bar = self._make(*self._columns, console=self._console)
        self._task = self._bar.add_task(what, total=total, completed=done, figures="")
        self._bar.start()

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=done, figures=_figures(values))

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Aligned columns; the first ``left`` columns to the left, the others to the right."""
    every = [header, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
