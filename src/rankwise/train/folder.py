"""The run folder: claimed by one run at a time, never written over."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

from rankwise.errors import EnvironmentFault, UserError

__all__ = ["claim", "refuse_used"]

_LOCK = "run.lock"


def refuse_used(folder: Path) -> None:
    """Refuse a folder that holds anything but the lock of a run that was killed as it began.

    Raises:
        UserError: it does; the message says how to go on or start elsewhere.
    """
    if folder.is_file():
        raise UserError(f"--out {folder} is a file; name a folder.")
    if (folder / "manifest.json").exists():
        raise UserError(
            f"'{folder}' holds a run already. Go on with it: rankwise fit --resume --out {folder}; "
            "or name another --out."
        )
    if folder.is_dir() and any(entry.name != _LOCK for entry in folder.iterdir()):
        raise UserError(f"'{folder}' is not empty, and is no run. Name another --out.")


@contextlib.contextmanager
def claim(folder: Path) -> Generator[None]:
    """Hold the folder for this process; a second run in it is refused while this one lives.

    The hold ends with the process, however it ends, so a killed run leaves no stale lock.

    Raises:
        UserError: another run holds it.
        EnvironmentFault: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise EnvironmentFault(
            f"The run folder '{folder}' cannot be written: {error.strerror}. Name another --out."
        ) from error
    try:
        if not _lock(handle):
            pid = os.read(handle, 32).decode("ascii", "replace").strip()
            raise UserError(
                f"Another run (process {pid or 'unknown'}) is writing into '{folder}'. Wait for "
                "it, stop it, or name another --out."
            )
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        _sweep(folder)
        yield
    finally:
        os.close(handle)


def _lock_windows(handle: int) -> bool:
    msvcrt: Any = importlib.import_module("msvcrt")
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def _sweep(folder: Path) -> None:
    """Remove what a run that was killed while it wrote has left under temporary names."""
    for left in [*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return _lock_windows(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
