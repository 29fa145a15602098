"""GGUF adapters of llama.cpp for Llama and Qwen: its names, its order of rotary rows, one alpha."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankwise.errors import ArtifactError, EnvironmentFault, UserError, gather
from rankwise.io.blueprint import Blueprint
from rankwise.io.files import missing, read_fault, write_chunks
from rankwise.io.gguf_names import (
    ARCHITECTURES,
    half_split,
    heads_of,
    interleaved,
    named_here,
    named_there,
    tied,
)
from rankwise.io.holding import FORMATS, demand
from rankwise.io.portable import Portable, assemble, pairs
from rankwise.io.reforms import join_parts, one_alpha, without_starts
from rankwise.io.tensors import nonfinite, shown
from rankwise.lowrank import Factors

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["read_gguf", "write_gguf"]

MAX_TENSORS = 100_000
_CHUNK = 1 << 20
_THERE = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<name>\w+)\.weight\.lora_(?P<side>[ab])")


def read_gguf(
    path: str | os.PathLike[str], *, base: Blueprint | None = None, allow_nonfinite: bool = False
) -> Portable:
    """Read a GGUF adapter, by the package gguf.

    s = adapter.lora.alpha / r of each tensor, or 1 where alpha is 0. Of a Llama model the rows of
    B of q and k lie in llama.cpp's order and are put back, for which the ``base`` tells the heads.

    Raises:
        UserError: there is no such file, or the base is needed.
        ArtifactError: lists all that is wrong with it.
        EnvironmentFault: the package is missing, or the file cannot be read.
    """
    where = f"'{path}'"
    _needed()
    reader = _opened(Path(path))
    architecture = _checked(reader, where)
    alpha = _number(reader, "adapter.lora.alpha")
    sides: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for name, tensor in _tensors(reader):
        found = _THERE.fullmatch(name)
        here = named_here(found["block"], found["name"]) if found is not None else None
        if found is None or here is None:
            problems.append(f"{shown(name)} is no A or B of a layer that is known here.")
        elif tensor.ndim != 2:
            problems.append(f"{shown(name)} has {tensor.ndim} dimensions, and 2 are needed.")
        else:
            fixed = tensor.mT if found["name"] == "token_embd" and found["side"] == "a" else tensor
            sides.setdefault(here, {})[found["side"].upper()] = fixed.contiguous()
    gather(ArtifactError, f"{where} cannot be used", problems)
    if not allow_nonfinite:
        flat = {f"{n}.{side}": t for n, both in sides.items() for side, t in both.items()}
        gather(ArtifactError, f"{where} holds numbers that are not finite", nonfinite(flat))
    factors: dict[str, Factors] = {}
    for name, (a, b) in pairs(sides, where).items():
        heads = heads_of(name, architecture, base)
        rows = b if heads is None else half_split(name, b, heads)
        factors[name] = Factors(a, rows, alpha / a.shape[0] if alpha else 1.0)
    embeddings = frozenset(n for n in factors if n.endswith("embed_tokens"))
    return Portable(assemble(factors), embeddings=embeddings)


def write_gguf(portable: Portable, path: str | os.PathLike[str], *, base: Blueprint) -> Portable:
    """Write a GGUF adapter in float32, which ``llama-cli --lora`` loads.

    ``general.architecture`` and the heads come from the config of the ``base``. The file has one
    alpha, divided by the rank of each tensor. In Llama models the rows of B of q and k change
    from halves to interleaved pairs within each head, as llama.cpp's rotary embedding has them.

    Raises:
        UserError: lists what the format cannot hold, or names that are not known here.
        EnvironmentFault: the package gguf is missing, or the disk refuses.
    """
    _needed()
    demand(portable, FORMATS["gguf"])
    kind = base.config.get("model_type")
    architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise UserError(
            f"{base.where} is of model_type {kind!r}, and GGUF names are known here for "
            f"{', '.join(ARCHITECTURES)}. llama.cpp's convert_lora_to_gguf.py knows more: "
            "rankwise convert --to peft --for llama.cpp writes what it reads."
        )
    portable = join_parts(without_starts(portable))
    there = {name: named_there(name) for name in portable.factors}
    problems = [f"'{n}' is no layer that is known here." for n, t in there.items() if t is None]
    problems.extend(tied(there, base))
    gather(UserError, "llama.cpp has no place for this adapter", problems)
    portable, alpha = one_alpha(portable, "a GGUF file has one alpha, divided by each rank")
    tensors: dict[str, Tensor] = {}
    for name, f in portable.factors.items():
        heads = heads_of(name, architecture, base)
        b = f.B if heads is None else interleaved(name, f.B, heads)
        tensors[f"{there[name]}.weight.lora_a"] = f.A.mT if there[name] == "token_embd" else f.A
        tensors[f"{there[name]}.weight.lora_b"] = b
    _write(Path(path), architecture, alpha, tensors)
    turned = [n for n in portable.factors if heads_of(n, architecture, base) is not None]
    if turned:
        portable = portable.noting(
            f"rotary: rows of B of {len(turned)} query and key projections were put into the order "
            "of llama.cpp"
        )
    return portable.noting(f"gguf: architecture {architecture}, adapter.lora.alpha {alpha:g}")


def _needed() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentFault(
            "GGUF adapters are read and written by the package gguf, which is not installed. "
            'Install it: pip install "rankwise[gguf]".'
        )


def _write(path: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as desk:
        file = Path(desk) / "adapter.gguf"
        writer = GGUFWriter(file, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors.items():
            plain = tensor.detach().to("cpu", torch.float32).contiguous()
            writer.add_tensor(name, plain.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with file.open("rb") as whole:
            write_chunks(path, iter(lambda: whole.read(_CHUNK), b""))


def _opened(path: Path) -> GGUFReader:
    """The package's reader on a file, after what it does not check."""
    from gguf import GGUFReader

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(24)
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise read_fault(path, error) from error
    if not size:
        raise ArtifactError(f"'{path}' is empty (0 bytes). Fetch or save it again.")
    if not head.startswith(b"GGUF") or len(head) < 24:
        raise ArtifactError(f"'{path}' is no GGUF file: it begins with {head[:4]!r}.")
    counts = [int.from_bytes(head[at : at + 8], "little") for at in (8, 16)]
    if max(counts) > MAX_TENSORS:
        raise ArtifactError(
            f"'{path}' announces {max(counts):,} entries; more than {MAX_TENSORS:,} are refused."
        )
    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise ArtifactError(
            f"'{path}' is damaged: the package gguf cannot read it ({error}). Fetch or save it "
            "again."
        ) from error
    end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=size)
    if size - end >= reader.alignment:
        raise ArtifactError(
            f"'{path}' is damaged: its tensors end at byte {end:,} and {size:,} are there."
        )
    return reader


def _checked(reader: GGUFReader, where: str) -> str:
    """The architecture of the base, once the file is known to be a LoRA adapter."""
    said = {key: _text(reader, key) for key in ("general.type", "adapter.type")}
    architecture = _text(reader, "general.architecture")
    problems = [
        f"{key} is {said[key]!r}, and '{wanted}' is needed."
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora"))
        if said[key] != wanted
    ]
    if architecture not in ARCHITECTURES.values():
        problems.append(
            f"general.architecture is {architecture!r}; known here are "
            f"{', '.join(dict.fromkeys(ARCHITECTURES.values()))}."
        )
    if not 0 <= _number(reader, "adapter.lora.alpha") < float("inf"):
        problems.append("adapter.lora.alpha is no number of 0 or more.")
    if reader.get_field("adapter.alora.invocation_tokens") is not None:
        problems.append("it is an activated LoRA, which applies to part of each text only.")
    gather(ArtifactError, f"{where} cannot be used", problems)
    return architecture or ""


def _text(reader: GGUFReader, key: str) -> str | None:
    field = reader.get_field(key)
    try:
        value: object = None if field is None else field.contents()
    except UnicodeDecodeError:
        return None
    return value if isinstance(value, str) else None


def _number(reader: GGUFReader, key: str) -> float:
    field = reader.get_field(key)
    value: object = 0.0 if field is None else field.contents()
    return float(value) if isinstance(value, int | float) else float("nan")


def _tensors(reader: GGUFReader) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    for entry in reader.tensors:
        yield entry.name, torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).float()
