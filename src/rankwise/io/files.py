"""Files and folders that appear whole or not at all, and what is said when the disk refuses."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Generator, Iterable
from pathlib import Path

from rankwise.errors import EnvironmentFault, RankwiseError, UserError, nearest

__all__ = [
    "append_text",
    "folder",
    "missing",
    "read_fault",
    "refuse_working_folder",
    "sha256_file",
    "write_bytes",
    "write_chunks",
    "write_json",
    "write_text",
]

_CHUNK = 1 << 20
_AT_FDCWD = -100  # linux/fcntl.h: names are relative to the working directory
_RENAME_EXCHANGE = 2  # linux/fs.h: swap two names in one step


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file so that a reader sees the old one or the new one, never a part.

    A temporary file in the same folder is written, flushed and synced, renamed over ``path``, and
    the folder is synced. Missing parent folders are made. The mode follows the umask. On any
    failure, an interrupt among them, the temporary file is removed and the old one is untouched.

    Raises:
        EnvironmentFault: the disk is full, the folder cannot be written to, and the like.
        UserError: ``path`` is a folder, or lies below a file.
    """
    return write_chunks(path, (data,))


def write_chunks(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview]) -> Path:
    """:func:`write_bytes` for content that comes in pieces and is never held whole."""
    target = _resolved(path)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        temporary = _temporary(target)
        try:
            with _created(temporary) as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """:func:`write_bytes` of the text in UTF-8, line ends as they are."""
    return write_bytes(path, text.encode("utf-8"))


def append_text(path: str | os.PathLike[str], text: str) -> int:
    """Add text in UTF-8 to the end of a file, made where it is missing; returns its new length.

    The file is not synced. Where only a part could be written, the file is cut back to what it was.

    Raises:
        EnvironmentFault: the disk is full, the folder cannot be written to, and the like.
        UserError: ``path`` is a folder, or lies below a file.
    """
    target = _resolved(path)
    with _explained(target), target.open("ab", buffering=0) as file:
        before = file.tell()
        rest = memoryview(text.encode("utf-8"))
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise
        return file.tell()


def write_json(path: str | os.PathLike[str], value: object) -> Path:
    """:func:`write_text` of JSON, indented, keys in their own order; NaN and Infinity are refused.

    Raises:
        UserError: the value holds something that JSON cannot express.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{os.fspath(path)}: this cannot be written as JSON: {error}.") from error
    return write_text(path, text + "\n")


@contextlib.contextmanager
def folder(path: str | os.PathLike[str]) -> Generator[Path]:
    """Give an empty folder to write into; at the end of the block it becomes ``path``, whole.

    What stood at ``path`` is replaced by one swap of names where the system has that (Linux), and
    otherwise moved aside, put back if the new folder cannot take its place, and only then deleted.
    If the block fails, the temporary folder is removed and ``path`` is as it was.

    Raises:
        EnvironmentFault: the disk is full, the folder cannot be written to, and the like.
        UserError: ``path`` is a file or lies below one, or the process stands inside it.
    """
    target = _resolved(path)
    refuse_working_folder(path)
    with _explained(target):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target)
        temporary.mkdir()
        try:
            yield temporary
            for inner in [*temporary.rglob("*"), temporary]:
                _sync_folder(inner) if inner.is_dir() else _sync_file(inner)
            _publish(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(target.parent)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits.

    Raises:
        UserError: there is no such file.
        EnvironmentFault: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise read_fault(path, error) from error
    return digest.hexdigest()


def missing(path: str | os.PathLike[str]) -> UserError:
    """The error for a file or folder that is not there, naming what is there instead."""
    wanted = Path(path)
    existing = wanted.parent
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    if existing != wanted.parent:
        return UserError(f"There is no '{wanted}': the folder '{existing}' exists, no more of it.")
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in existing.iterdir())
        hint = nearest(wanted.name, names)
        listed = f" It holds: {', '.join(names[:8])}." if names and not hint else ""
        return UserError(f"There is no '{wanted.name}' in '{existing}'.{hint}{listed}")
    return UserError(f"There is no '{wanted}'.")


def read_fault(path: str | os.PathLike[str], error: OSError) -> RankwiseError:
    """The error for a file that exists and cannot be read."""
    if isinstance(error, IsADirectoryError):
        return UserError(f"'{os.fspath(path)}' is a folder, and a file is needed.")
    why = error.strerror or type(error).__name__
    return EnvironmentFault(
        f"'{os.fspath(path)}' cannot be read: {why}. Check its permissions and the disk."
    )


def _resolved(path: str | os.PathLike[str]) -> Path:
    """The place a path means, links followed, so that a link stays and its target is replaced."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise UserError(f"{os.fspath(path)!r} is no path: {error}.") from error


@contextlib.contextmanager
def _explained(target: Path) -> Generator[None]:
    """Turn what the system says into one of our errors."""
    try:
        yield
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise UserError(
            f"'{target}' cannot be written: {error.strerror}. Name another place."
        ) from error
    except OSError as error:
        remedy = {
            errno.ENOSPC: "Free some space or name a place on another disk",
            errno.EDQUOT: "Free some of your quota or name another place",
            errno.EFBIG: "Raise the limit on file size (ulimit -f) or name another place",
            errno.EROFS: "Name a place that can be written to",
            errno.EACCES: "Name a folder that you may write to, or change its permissions",
            errno.EPERM: "Name a folder that you may write to, or change its permissions",
            errno.ENAMETOOLONG: "Choose a shorter name",
        }.get(error.errno or 0, "Check the disk or name another place")
        why = error.strerror or type(error).__name__
        raise EnvironmentFault(
            f"'{target}' was not written: {why}. What was there before is unchanged. {remedy}."
        ) from error


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _created(path: Path):
    """A new file open for writing, its mode set by the umask as for any other file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    return os.fdopen(descriptor, "wb")


_BINARY = getattr(os, "O_BINARY", 0)  # only Windows has it, and needs it


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where a folder can be opened and synced at all."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def refuse_working_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be replaced, before the work whose results are to lie there.

    Raises:
        UserError: the process stands in it or below it.
    """
    target, here = _resolved(path), Path.cwd()
    if here == target or target in here.parents:
        raise UserError(
            f"'{target}' is the folder this process works in, or holds it, and a folder is "
            "replaced as a whole. Name a new folder inside it."
        )


def _publish(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``, which may be absent or a folder."""
    if not target.exists():
        new.rename(target)
    elif _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
    else:
        aside = _temporary(target)
        target.rename(aside)
        try:
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
