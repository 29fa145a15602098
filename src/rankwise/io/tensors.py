"""safetensors files: everything checked before anything is allocated, and written whole."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rankwise.errors import ArtifactError, UserError, gather
from rankwise.io.files import missing, read_fault, write_chunks

__all__ = [
    "MAX_TENSORS",
    "TensorFile",
    "all_finite",
    "nonfinite",
    "read_tensors",
    "shown",
    "strict_json",
    "write_tensors",
]

MAX_HEADER = 32 * 1024 * 1024  # bytes; 100,000 tensors with long names need about 20 million
MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
_MOST = 1 << 56  # elements; far below what 64-bit sizes can count, far above any tensor

_SIZES: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds.

    Attributes:
        tensors: by name, on the CPU, in the dtype of the file.
        metadata: the free text pairs of its header.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class _Entry:
    """One tensor as the header describes it: bytes [begin, end) of the data part."""

    name: str
    begin: int
    end: int


def read_tensors(path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> TensorFile:
    """Read a safetensors file, or say all that is wrong with it.

    The header is checked in full before any tensor is made: its length, its JSON, duplicate names,
    the number of tensors, and that the tensors lie one after another without gap or overlap, each
    as long as its shape and dtype say, up to the last byte of the file. The library that reads the
    data lets duplicate names, any number of tensors, NaN and infinity pass; this does not.

    Raises:
        UserError: there is no such file, or it is a folder or a device.
        ArtifactError: it is damaged, or holds NaN or infinity and ``allow_nonfinite`` is false.
        EnvironmentFault: it cannot be read.
    """
    where = Path(path)
    metadata = _check(where)
    try:
        tensors = load_file(where)
    except SafetensorError as error:
        raise ArtifactError(f"'{where}' is not a valid safetensors file: {error}.") from error
    except OSError as error:
        raise read_fault(where, error) from error
    if not allow_nonfinite:
        gather(ArtifactError, f"'{where}' holds numbers that are not finite", nonfinite(tensors))
    return TensorFile(tensors, metadata)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a safetensors file whole or not at all (:func:`rankwise.io.files.write_chunks`).

    Tensors may lie on any device, be views and share storage; each is written out in full. They
    are ordered by falling element size, then by name, so equal content gives equal bytes.

    Raises:
        UserError: a dtype that this format is not used for here, or a tensor without data.
        EnvironmentFault: the disk refuses.
    """
    problems = [
        f"{shown(name)} is {'a meta tensor' if t.is_meta else t.dtype}"
        for name, t in tensors.items()
        if t.is_meta or t.dtype not in _NAMES
    ]
    gather(UserError, f"'{os.fspath(path)}': these tensors cannot be written", problems)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return write_chunks(path, _pieces(text, (tensors[name] for name in order)))


def shown(name: str) -> str:
    """A name from a file as it may be put into a message: quoted, on one line, not too long."""
    return repr(name if len(name) <= 160 else name[:150] + "...")


def strict_json(text: bytes, where: str, what: str) -> dict[str, object]:
    """Parse a JSON object from a file nobody vouches for.

    Duplicate keys, NaN, Infinity and nesting deeper than Python's parser goes are refused.

    Raises:
        ArtifactError: it is not that.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise ArtifactError(f"{where}: {what} is nested too deeply to be genuine.") from error
    except ValueError as error:
        raise ArtifactError(f"{where}: {what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: {what} must be a JSON object, not {type(value).__name__}.")
    return cast("dict[str, object]", value)


def _pieces(header: bytes, tensors: Iterator[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def _check(path: Path) -> dict[str, str]:
    """Everything about the file that can be told without making a tensor; gives its metadata."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode) or not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UserError(f"'{path}' is {kind}, and a safetensors file is needed.")
        with path.open("rb") as file:
            length = _header_length(path, status.st_size, file.read(8))
            text = file.read(length)
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise read_fault(path, error) from error
    _limit(path, text.count(b'"data_offsets"'))  # cheap, and before the header is parsed
    header = strict_json(text, f"'{path}'", "the header")
    metadata = header.pop("__metadata__", None)
    _limit(path, len(header))
    problems: list[str] = []
    entries = [e for name, value in header.items() if (e := _entry(name, value, problems))]
    texts = _texts(metadata, problems)
    if not problems:
        problems.extend(_layout(entries, status.st_size - 8 - length))
    gather(ArtifactError, f"'{path}' is damaged", problems)
    return texts


def _limit(path: Path, count: int) -> None:
    if count > MAX_TENSORS:
        raise ArtifactError(
            f"'{path}' announces {count:,} tensors; more than {MAX_TENSORS:,} are refused."
        )


def _header_length(path: Path, size: int, first: bytes) -> int:
    if size == 0:
        raise ArtifactError(
            f"'{path}' is empty (0 bytes). It was not written to the end, or was cut off while it "
            "was copied; fetch or save it again."
        )
    if len(first) < 8:
        raise ArtifactError(
            f"'{path}' is damaged: a safetensors file has 8 bytes at least, this has {size}."
        )
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise ArtifactError(
            f"'{path}' is damaged or not a safetensors file: its header claims {length:,} bytes, "
            f"and more than {MAX_HEADER:,} are refused."
        )
    if 8 + length > size:
        raise ArtifactError(
            f"'{path}' is damaged: the header alone needs {8 + length:,} bytes, the file has "
            f"{size:,}. Fetch or save it again."
        )
    return length


def _entry(name: str, value: object, problems: list[str]) -> _Entry | None:
    """One header entry, or None and a problem."""
    if not isinstance(value, dict):
        problems.append(f"{shown(name)} is described by {type(value).__name__}, not by an object.")
        return None
    fields = cast("dict[str, object]", value)
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        problems.append(
            f"{shown(name)} must be described by dtype, shape and data_offsets, and is by "
            f"{', '.join(shown(key) for key in fields) or 'nothing'}."
        )
        return None
    dtype, shape, offsets = fields["dtype"], _whole(fields["shape"]), _whole(fields["data_offsets"])
    size = _SIZES.get(dtype) if isinstance(dtype, str) else None
    if size is None:
        problems.append(f"{shown(name)} has dtype {_brief(dtype)}; known are {', '.join(_SIZES)}.")
    if shape is not None and (len(shape) > _MAX_DIMENSIONS or math.prod(map(_one, shape)) > _MOST):
        shape = None
    if shape is None:
        problems.append(f"{shown(name)} has no possible shape: {_brief(fields['shape'])}.")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        problems.append(f"{shown(name)} has no valid offsets: {_brief(fields['data_offsets'])}.")
        return None
    if size is None or shape is None:
        return None
    wanted, held = math.prod(shape) * size, offsets[1] - offsets[0]
    if wanted != held:
        problems.append(
            f"{shown(name)} {shape} of {dtype} needs {wanted:,} bytes, its offsets span {held:,}."
        )
        return None
    return _Entry(name, offsets[0], offsets[1])


def _layout(entries: list[_Entry], held: int) -> Iterator[str]:
    """Tensors must follow each other from byte 0 to the last byte of the file."""
    reached = 0
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != reached:
            kind = "overlaps the tensor before it" if entry.begin < reached else "leaves a hole"
            yield (
                f"{shown(entry.name)} {kind}: it begins at byte {entry.begin:,}, and byte "
                f"{reached:,} was next."
            )
        reached = max(reached, entry.end)
    if reached != held:
        state = "cut off" if held < reached else "followed by foreign bytes"
        yield (
            f"expected {reached:,} bytes of data, has {held:,}: the file was {state}. "
            "Fetch or save it again."
        )


def _texts(metadata: object, problems: list[str]) -> dict[str, str]:
    if metadata is None:
        return {}
    if isinstance(metadata, dict):
        pairs = cast("dict[str, object]", metadata)
        texts = {key: value for key, value in pairs.items() if isinstance(value, str)}
        if len(texts) == len(pairs):
            return texts
    problems.append("__metadata__ must hold texts by name.")
    return {}


def _whole(value: object) -> list[int] | None:
    """A list of whole numbers from 0, or None."""
    if not isinstance(value, list):
        return None
    numbers = cast("list[object]", value)
    whole = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    return whole if len(whole) == len(numbers) else None


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum that is finite says so in one pass over the tensor; only where it is not, the elements
    are looked at one by one, as a sum of large numbers overflows too.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return bool(tensor.sum(dtype=wide).isfinite()) or bool(torch.isfinite(tensor).all())


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """One sentence for each tensor that holds NaN or infinity."""
    return [
        f"{shown(name)} has {int((~torch.isfinite(t)).sum()):,} of {t.numel():,} NaN or infinite. "
        "Training diverged, or the file is damaged; allow_nonfinite reads it all the same."
        for name, t in tensors.items()
        if t.is_floating_point() and not all_finite(t)
    ]


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return result


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _brief(value: object) -> str:
    try:
        return shown(value) if isinstance(value, str) else shown(str(value))[1:-1]
    except (RecursionError, ValueError):
        return type(value).__name__


def _one(size: int) -> int:
    return max(size, 1)
