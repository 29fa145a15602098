"""The most memory that a run held, of its device or its process, and what a process holds now."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["PeakMemory", "give_back", "resident"]


class PeakMemory:
    """Begins to watch; :meth:`record` says what the most was since then.

    On a CUDA device it is what torch allocated there. Elsewhere it is the resident memory of the
    process, libraries included, which the system keeps as one highest value over the life of the
    process: where the process held more before the run than during it, the run's own peak is not
    known. A run in a process of its own is always known.

    Args:
        device: where the model is trained.
        earlier: the record of what went before, when a run goes on.
    """

    def __init__(self, device: torch.device, earlier: Mapping[str, Any] | None = None) -> None:
        self._device = device
        self._earlier = earlier
        self._before = _process_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def record(self) -> dict[str, Any] | None:
        """What was held ("device" or "process") and its peak in bytes; None when not known."""
        if self._device.type == "cuda":
            held, peak = "device", torch.cuda.max_memory_allocated(self._device)
        else:
            held, peak = "process", _process_peak()
            if peak is None or peak == self._before:
                return dict(self._earlier) if self._earlier else None
        if self._earlier and self._earlier["of"] == held:
            peak = max(peak, self._earlier["peak"])
        return {"of": held, "peak": peak}


def _process_peak() -> int | None:
    """The most resident memory of this process so far, in bytes; None where nobody says.

    Linux says it in /proc; what getrusage says there is at least what the process that started
    this one held.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)
    except (OSError, StopIteration):  # no Linux
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int | None:
    """The resident memory of this process now, in bytes, or where only that is told, its peak."""
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        return _process_peak()


def give_back() -> None:
    """Hand freed memory of this process back to the system, where the C library can (glibc).

    It keeps what was freed for the next request, and training leaves holes that fit nothing an
    evaluation asks for. It takes milliseconds; what is needed again is asked for again.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
