"""mlx-lm's adapters: both factors transposed, the scale itself, and the last layers by number."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import Tensor

from rankwise.errors import ArtifactError, UserError, gather
from rankwise.io import files
from rankwise.io.blueprint import Blueprint
from rankwise.io.holding import FORMATS, demand
from rankwise.io.json_files import read_json
from rankwise.io.portable import Portable, assemble, pairs
from rankwise.io.reforms import join_parts, one_rank, one_scale, without_starts
from rankwise.io.tensors import read_tensors, shown, write_tensors
from rankwise.lowrank import Factors

__all__ = ["CONFIG", "WEIGHTS", "read_mlx", "write_mlx"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
_OUTPUTS = ("lm_head", "output", "embed_out")
_MODELS = ("model.layers.", "model.embed_tokens", "lm_head")
_BLOCK = re.compile(r"(?P<before>.*?\blayers|.*?\bh|.*?\bblocks)\.(?P<number>\d+)\.(?P<key>.+)")


def read_mlx(
    folder: str | os.PathLike[str],
    *,
    base: Blueprint | None = None,
    allow_nonfinite: bool = False,
) -> Portable:
    """Read adapters.safetensors and adapter_config.json of mlx-lm.

    lora_a is (in, r) and lora_b (r, out), so A = lora_aᵀ and B = lora_bᵀ; ``scale`` is s itself.
    ``m`` of a DoRA adapter is the magnitude. Embeddings are told by the names that mlx-lm's models
    give them. Where the output is tied to one, mlx-lm applies the update to both, which the
    ``base`` tells; without it a note says so.

    Raises:
        UserError: there is no such folder or file.
        ArtifactError: lists all that is wrong with it.
        EnvironmentFault: a file cannot be read.
    """
    home = Path(folder)
    where = f"The adapter in '{home}'"
    scale, kind = _settings(home / CONFIG)
    sides: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    problems: list[str] = []
    tensors = read_tensors(home / WEIGHTS, allow_nonfinite=allow_nonfinite).tensors
    for key, tensor in tensors.items():
        name, _, end = key.rpartition(".")
        if end in ("lora_a", "lora_b") and tensor.ndim == 2:
            sides.setdefault(name, {})[end[-1].upper()] = tensor.mT.contiguous()
        elif end in ("lora_a", "lora_b") and tensor.ndim == 3:
            problems.append(f"{shown(key)} belongs to a bank of experts, which is not supported.")
        elif end == "m" and kind == "dora":
            magnitudes[name] = tensor
        else:
            problems.append(f"{shown(key)} is neither lora_a, lora_b nor a magnitude of DoRA.")
    lost = [n for n in sides if kind == "dora" and n not in magnitudes]
    problems.extend(f"'{n}' has no magnitude m, and fine_tune_type is dora." for n in lost)
    problems.extend(f"'{n}' has a magnitude and no factors." for n in magnitudes if n not in sides)
    gather(ArtifactError, f"{where} cannot be used", problems)
    factors = {n: Factors(a, b, scale) for n, (a, b) in pairs(sides, where).items()}
    embeddings = frozenset(n for n in factors if n.rpartition(".")[2] in _EMBEDDINGS)
    adapter = assemble(factors, magnitudes=magnitudes)
    if embeddings and base is not None:
        method = replace(adapter.method, tied=_tied(base))
        return Portable(replace(adapter, method=method), embeddings=embeddings)
    told = (
        f"tied: where the output shares its weight with '{name}', mlx-lm applied the update to "
        "both ends, and here it is of the embedding alone; the base tells (--base)"
        for name in embeddings
    )
    return Portable(adapter, embeddings=embeddings, notes=tuple(told))


def write_mlx(
    portable: Portable, folder: str | os.PathLike[str], *, base: Blueprint | None = None
) -> Portable:
    """Write a folder that ``mlx_lm.load(model, adapter_path=folder)`` reads.

    mlx-lm builds its layers from one rank, one scale, ``keys`` and ``num_layers``, and refuses a
    tensor that finds no layer. Where the last n blocks all have the same adapted modules, and the
    ``base`` says how many blocks there are, ``keys`` are the names in a block; otherwise they are
    full names, which mlx-lm looks up in the whole model.

    Raises:
        UserError: lists what these files cannot hold.
        EnvironmentFault: the disk refuses.
    """
    demand(portable, FORMATS["mlx"])
    _refuse_mixtures(portable, base)
    portable = join_parts(without_starts(portable))
    portable, scale = one_scale(portable, "mlx-lm has one scale for all layers")
    portable = one_rank(portable, "mlx-lm has one rank for all layers")
    adapter = portable.adapter
    tensors = {
        f"{name}.{key}": tensor.mT.contiguous()
        for name, f in adapter.factors.items()
        for key, tensor in (("lora_a", f.A), ("lora_b", f.B))
    }
    tensors.update({f"{name}.m": m for name, m in adapter.magnitudes.items()})
    keys, layers, said = _selection(list(adapter.factors), base)
    config: dict[str, object] = {
        "fine_tune_type": "dora" if adapter.magnitudes else "lora",
        "num_layers": layers,
        "lora_parameters": {
            "rank": adapter.method.r,
            "scale": scale,
            "dropout": adapter.method.dropout,
            "keys": keys,
        },
    }
    if portable.base is not None:
        config["model"] = portable.base
    with files.folder(folder) as inside:
        write_tensors(inside / WEIGHTS, tensors)
        files.write_json(inside / CONFIG, config)
    foreign = [name for name in adapter.factors if not name.startswith(_MODELS)]
    if foreign:
        portable = portable.noting(
            f"names: '{foreign[0]}' is kept as it is; mlx-lm's models have their blocks in "
            "model.layers, and it refuses a name that its model lacks"
        )
    return portable.noting(said, f"scale: {scale:g}, which in mlx-lm is the multiplier itself")


def _settings(path: Path) -> tuple[float, str]:
    """The scale and the kind of an adapter_config.json of mlx-lm."""
    raw = read_json(path)
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ArtifactError(
            f"'{path}': fine_tune_type is {kind!r}, and 'lora' or 'dora' is needed: after full "
            "fine-tuning there is no low-rank update to convert."
        )
    parameters = raw.get("lora_parameters")
    table = cast("dict[str, object]", parameters) if isinstance(parameters, dict) else {}
    scale = table.get("scale")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < 1e9:
        raise ArtifactError(
            f"'{path}': lora_parameters.scale must be a number above 0, the multiplier of the "
            f"update, and is {scale!r}."
        )
    return float(scale), cast("str", kind)


def _refuse_mixtures(portable: Portable, base: Blueprint | None) -> None:
    adapter = portable.adapter
    problems: list[str] = []
    plain = [n for n in adapter.factors if n not in adapter.magnitudes]
    if adapter.magnitudes and plain:
        problems.append(f"mlx-lm has DoRA everywhere or nowhere, and '{plain[0]}' has none.")
    if adapter.magnitudes and portable.embeddings:
        problems.append("an embedding's magnitude is by token in mlx-lm and not here.")
    problems.extend(_tie_problems(portable, base))
    gather(UserError, "mlx-lm would compute something else", problems)


def _tie_problems(portable: Portable, base: Blueprint | None) -> Iterator[str]:
    """Where the output shares its weight with the embedding, mlx-lm has the update on both."""
    tied = portable.adapter.method.tied
    if not tied and portable.embeddings and base is not None and _tied(base):
        yield (
            "the base ties its output to its embedding, and mlx-lm then applies an update of the "
            "embedding to the output as well, which this one was not trained for."
        )
    if tied and portable.embeddings and base is None:
        yield (
            "one update is on two tied layers, and mlx-lm does the same where the base ties them, "
            "which only the base tells: --base FOLDER."
        )
    if tied and portable.embeddings and base is not None and not _tied(base):
        yield "one update is on two tied layers, and this base does not tie them."
    output = [n for n in portable.factors if n.rpartition(".")[2] in _OUTPUTS]
    if tied and output:
        yield (
            f"one update is on two tied layers, and it is named by the output layer '{output[0]}', "
            "which mlx-lm's model does not have then. Train it on the embedding instead."
        )


def _selection(names: list[str], base: Blueprint | None) -> tuple[list[str], int, str]:
    """``keys``, ``num_layers`` and a sentence about them."""
    found = {name: _BLOCK.fullmatch(name) for name in names}
    blocks: dict[int, set[str]] = {}
    for match in found.values():
        if match is not None:
            blocks.setdefault(int(match["number"]), set()).add(match["key"])
    total = _blocks(base)
    first = min(blocks, default=0)
    layers = max((total or max(blocks, default=0) + 1) - first, 1)
    same = total is not None and sorted(blocks) == list(range(first, total))
    if same and None not in found.values() and len(set(map(frozenset, blocks.values()))) == 1:
        return (
            sorted(blocks[first]),
            layers,
            f"keys: by name in a block, in the last {layers} blocks",
        )
    return (
        sorted(names),
        layers,
        "keys: by full name, as the blocks differ or the base is not known",
    )


def _tied(base: Blueprint) -> bool:
    return base.config.get("tie_word_embeddings") is True


def _blocks(base: Blueprint | None) -> int | None:
    if base is None:
        return None
    for key in ("num_hidden_layers", "n_layer", "n_layers"):
        if key in base.config:
            return base.number(key)
    return None
