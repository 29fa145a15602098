"""Ctrl+C and SIGTERM as a request to save and stop; a second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "StopRequest"]


class Interrupted(Exception):
    """The run was asked to stop, and saved what it had.

    Attributes:
        number: the signal's number; the exit code is 128 + number (130 for Ctrl+C).
        resume: the command that goes on from here.
    """

    def __init__(self, number: int, resume: str) -> None:
        super().__init__(f"Stopped on request. Go on with: {resume}")
        self.number = number
        self.resume = resume


class StopRequest:
    """While the block runs, SIGINT and SIGTERM are kept in ``number`` instead of ending it.

    After the first, which is answered with a line to ``note``, the former handlers are back, so a
    second one ends the program at once. Outside the main thread signals cannot be caught, and
    nothing is changed.
    """

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        self.number: int | None = None
        self._note = note
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        if self._note is not None:
            # the signal may have come in the middle of another line, which streams refuse to mix
            with contextlib.suppress(RuntimeError):
                self._note("Stopping after this step; again to stop at once.")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
