"""Pickled checkpoints: opened only on request, as plain tensors, and never run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from rankwise.errors import ArtifactError, EnvironmentFault, UserError, gather
from rankwise.io.files import missing, read_fault, write_bytes
from rankwise.io.tensors import MAX_TENSORS, nonfinite, shown

__all__ = ["ENDINGS", "ask_for_pickle", "read_pickle", "write_pickle"]

ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
_ZIP = b"PK\x03\x04"  # what torch has written since 1.6
_PICKLE = b"\x80"  # what it wrote before: a bare pickle of protocol 2 or more
_SAFE = (2, 10)  # below, even weights_only could be tricked: CVE-2025-32434, CVE-2026-24747
_WRAPPERS = ("model_state_dict", "state_dict", "model")


def read_pickle(
    path: str | os.PathLike[str], *, allow_nonfinite: bool = False
) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, by name, on the CPU.

    A pickle is a program. torch is told to run none of it but what makes tensors and plain
    containers (``weights_only=True``), and no other way is tried when that fails. What comes out
    must be a mapping of names to plain tensors, none of them larger than the file; it may lie under
    "model_state_dict", "state_dict" or "model".

    Raises:
        UserError: there is no such file, or it is a folder.
        ArtifactError: it is damaged, is no checkpoint, holds more than tensors, or NaN or infinity
            and ``allow_nonfinite`` is false.
        EnvironmentFault: it cannot be read, or torch is too old to be trusted with it.
    """
    where = Path(path)
    version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SAFE:
        raise EnvironmentFault(
            f"torch {torch.__version__} is too old to open a pickle from elsewhere: versions below "
            "2.10 have known holes there. Update it: pip install -U torch."
        )
    size = _check(where)
    try:
        value: object = torch.load(where, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"'{where}' holds more than tensors, and opening it fully could run any code, so it "
            "was not opened. Fetch it again, or have whoever made it save it as safetensors. "
            f"{_first(error)}"
        ) from error
    except Exception as error:
        raise ArtifactError(
            f"'{where}' is damaged: torch cannot read it ({_first(error)}). Fetch or save it again."
        ) from error
    tensors = _state(value, where, size)
    if not allow_nonfinite:
        gather(ArtifactError, f"'{where}' holds numbers that are not finite", nonfinite(tensors))
    return tensors


def ask_for_pickle(path: str | os.PathLike[str], allowed: bool) -> None:
    """Refuse a pickle that nobody asked to open.

    Raises:
        UserError: it is not allowed.
    """
    if not allowed:
        raise UserError(
            f"'{os.fspath(path)}' is a pickle. Rankwise opens one only when asked to "
            "(allow_pickle=True, --allow-pickle), and then as plain tensors, so that no code in it "
            "runs. Ask for it where you trust who made the file."
        )


def write_pickle(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors as a plain dict by torch.save, whole or not at all.

    Raises:
        EnvironmentFault: the disk refuses.
    """
    buffer = io.BytesIO()
    plain = {key: tensor.detach().to("cpu").clone() for key, tensor in tensors.items()}
    torch.save(plain, buffer)
    return write_bytes(path, buffer.getvalue())


def _check(path: Path) -> int:
    """What the size and the first bytes tell, in words that say what to do; gives the size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(4)
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise read_fault(path, error) from error
    if not size:
        raise ArtifactError(f"'{path}' is empty (0 bytes). Fetch or save it again.")
    if first == _ZIP:
        _check_zip(path, size)
    elif not first.startswith(_PICKLE):
        raise ArtifactError(
            f"'{path}' is no checkpoint of torch: it begins with {first!r}. A page or a pointer "
            "saved in place of the file looks like this; fetch it again."
        )
    return size


def _check_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ArtifactError(
            f"'{path}' is damaged: its archive was cut off or changed ({_first(error)}). Fetch or "
            "save it again."
        ) from error
    if unpacked > size:
        raise ArtifactError(
            f"'{path}' claims to hold {unpacked:,} bytes in {size:,}; torch never compresses, so "
            "this was made to fill the memory."
        )


def _state(value: object, path: Path, size: int) -> dict[str, Tensor]:
    """The dict of tensors in what was read."""
    inner = value
    if isinstance(inner, dict):
        outer = cast("dict[object, object]", inner)
        wrapped = [key for key in _WRAPPERS if isinstance(outer.get(key), dict)]
        inner = outer[wrapped[0]] if wrapped else outer
    if not isinstance(inner, dict) or not inner:
        raise ArtifactError(
            f"'{path}' holds {type(inner).__name__}, and a dict of tensors by name is needed."
        )
    table = cast("dict[object, object]", inner)
    if len(table) > MAX_TENSORS:
        raise ArtifactError(
            f"'{path}' holds {len(table):,} entries; more than {MAX_TENSORS:,} are refused."
        )
    problems: list[str] = []
    pairs = {
        str(k): t for k, v in table.items() if (t := _tensor(k, v, size, problems)) is not None
    }
    gather(ArtifactError, f"'{path}' holds more than tensors by name", problems)
    return pairs


def _tensor(key: object, value: object, size: int, problems: list[str]) -> Tensor | None:
    """A tensor by itself in memory, or None and a problem."""
    if not isinstance(key, str):
        problems.append(f"a name is {type(key).__name__}, not a text.")
    elif not isinstance(value, Tensor):
        problems.append(f"{shown(key)} is {type(value).__name__}. Save the state dict alone.")
    elif value.layout != torch.strided or value.is_quantized or value.dtype.is_complex:
        problems.append(f"{shown(key)} is {value.dtype} in the layout {value.layout}.")
    elif value.device.type != "cpu":
        problems.append(f"{shown(key)} has no numbers (device {value.device}).")
    elif value.numel() * value.element_size() > size:
        problems.append(
            f"{shown(key)} {tuple(value.shape)} is larger than the whole file, {size:,} bytes."
        )
    else:
        return value.detach().clone(memory_format=torch.contiguous_format)
    return None


def _first(error: BaseException) -> str:
    """The first sentence of an error, which may be pages long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
