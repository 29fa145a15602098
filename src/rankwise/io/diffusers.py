"""diffusers' pytorch_lora_weights.safetensors: PEFT's names behind the name of a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor

from rankwise.errors import ArtifactError, RankwiseError, UserError, gather
from rankwise.io.holding import FORMATS, demand
from rankwise.io.peft_names import value_for
from rankwise.io.portable import Kernel, Portable, assemble, pairs
from rankwise.io.reforms import fold, join_parts, one_rank, without_starts
from rankwise.io.tensors import read_tensors, shown, strict_json, write_tensors
from rankwise.lowrank import Factors, scaling

__all__ = ["WEIGHTS", "read_diffusers", "write_diffusers"]

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
_COMPONENT = re.compile(r"(unet|transformer|text_encoder|prior)(_\d+)?")
_KEY = re.compile(
    r"(?P<name>.+)\.(?:lora_(?P<side>[AB])\.weight|(?P<m>lora_magnitude_vector)(?:\.weight)?"
    r"|(?P<alpha>alpha))"
)
_OLD = re.compile(r".*(\.lora\.(down|up)|_lora\.(down|up)|lora_linear_layer\.(down|up))\.weight")
_SAID = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass
class _Model:
    """The tensors for one model of the pipeline."""

    sides: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    magnitudes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    alphas: dict[str, float] = field(default_factory=dict[str, float])


def read_diffusers(
    path: str | os.PathLike[str], *, component: str | None = None, allow_nonfinite: bool = False
) -> Portable:
    """Read what ``pipeline.save_lora_weights(folder)`` wrote, for one model of the pipeline.

    Keys are ``unet.<module>.lora_A.weight`` and so on. r and alpha come from the LoraConfig in the
    metadata of the file; where there is none, alpha is r, or what ``<module>.alpha`` says.

    Raises:
        UserError: there is no such file, or it is for several models and none was named.
        ArtifactError: lists all that is wrong with it.
        EnvironmentFault: it cannot be read.
    """
    place = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    where = f"'{place}'"
    file = read_tensors(place, allow_nonfinite=allow_nonfinite)
    models = _models(file.tensors, where)
    chosen = _chosen(list(models), component, where)
    model = models[chosen]
    config = _config(file.metadata.get(METADATA_KEY), chosen, where)
    kernels = {n: k for n, both in model.sides.items() if (k := _kernel(both)) is not None}
    flat = {
        name: {side: t.flatten(1) if t.ndim > 2 else t for side, t in both.items()}
        for name, both in model.sides.items()
    }
    made: dict[str, Factors] = {}
    problems: list[str] = []
    for name, (a, b) in pairs(flat, where).items():
        try:
            made[name] = Factors(a, b, _scale(name, a.shape[0], config, model.alphas.get(name)))
        except RankwiseError as error:
            problems.append(f"'{name}': {error}")
    problems.extend(
        f"'{name}' has a magnitude that does not go with its factors."
        for name, m in model.magnitudes.items()
        if name in made and m.numel() != made[name].out_features
    )
    gather(ArtifactError, f"{where} cannot be used", problems)
    magnitudes = {n: m.reshape(-1) for n, m in model.magnitudes.items()}
    other = [word for word in models if word != chosen]
    said = "as its metadata says" if config else "r where nothing is said, as it has no metadata"
    return Portable(
        assemble(made, magnitudes=magnitudes),
        kernels=kernels,
        component=chosen or component,
        notes=(
            f"alpha: {said}",
            *((f"left out: {', '.join(other)}, other models of the pipeline",) if other else ()),
        ),
    )


def write_diffusers(
    portable: Portable, folder: str | os.PathLike[str], *, component: str | None = None
) -> Portable:
    """Write the file that ``pipeline.load_lora_weights(folder)`` reads.

    Versions that do not read the metadata take alpha = r, and some scale mixed ranks by the order
    of the file, so the scale goes into B and ranks become one; then every version agrees.

    Raises:
        UserError: lists what these files cannot hold, or no ``component`` is known.
        EnvironmentFault: the disk refuses.
    """
    demand(portable, FORMATS["diffusers"])
    prefix = component or portable.component
    if prefix is None or _COMPONENT.fullmatch(prefix) is None:
        raise UserError(
            "A file of diffusers names the model of the pipeline that each update is for"
            + (f", and '{prefix}' is none" if prefix else "")
            + ". Give component (--component): unet, transformer, text_encoder or text_encoder_2."
        )
    portable = join_parts(without_starts(portable))
    if any(f.scale != 1 for f in portable.factors.values()):
        portable = fold(portable, "diffusers takes alpha = r where it does not read the metadata")
    portable = one_rank(portable, "some versions of diffusers scale mixed ranks wrongly")
    adapter = portable.adapter
    tensors: dict[str, Tensor] = {}
    for name, f in adapter.factors.items():
        kernel = portable.kernels.get(name)
        ones = () if kernel is None else tuple(1 for _ in kernel.shape[1:])
        a = f.A if kernel is None else f.A.reshape(-1, *kernel.shape)
        tensors[f"{prefix}.{name}.lora_A.weight"] = a
        tensors[f"{prefix}.{name}.lora_B.weight"] = f.B.reshape(*f.B.shape, *ones)
        if name in adapter.magnitudes:
            m = adapter.magnitudes[name]
            key = f"{prefix}.{name}.lora_magnitude_vector"
            tensors[key] = m if kernel is None else m.reshape(1, -1, *ones)
    config: dict[str, object] = {
        "r": adapter.method.r,
        "lora_alpha": adapter.method.r,
        "target_modules": sorted(adapter.factors),
        "use_dora": bool(adapter.magnitudes),
        "lora_dropout": adapter.method.dropout,
    }
    packed = {f"{prefix}.{key}": value for key, value in config.items()}
    metadata = {METADATA_KEY: json.dumps(packed, indent=2, sort_keys=True)}
    write_tensors(Path(folder) / WEIGHTS, tensors, metadata)
    return portable.noting(f"component: for the {prefix} of the pipeline")


def _models(tensors: Mapping[str, Tensor], where: str) -> dict[str, _Model]:
    """The tensors of each model; "" is one without a name in front."""
    words = {key.partition(".")[0] for key in tensors}
    bare = not any(_COMPONENT.fullmatch(word) for word in words)
    found: dict[str, _Model] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        word, _, rest = ("", "", key) if bare else key.partition(".")
        match = _KEY.fullmatch(rest)
        if match is None:
            problems.append(f"{shown(key)} is no name of diffusers.{_hint(key)}")
            continue
        model = found.setdefault(word, _Model())
        name = match["name"]
        if match["side"]:
            model.sides.setdefault(name, {})[match["side"]] = tensor
        elif match["m"]:
            model.magnitudes[name] = tensor
        else:
            model.alphas[name] = float(tensor.reshape(-1)[0])
    gather(ArtifactError, f"{where} cannot be used", problems)
    return found


def _hint(key: str) -> str:
    if _OLD.fullmatch(key):
        return " It is of diffusers before 0.22; load it there and save it again."
    if key.startswith("base_model.model."):
        return " It is PEFT's; name its folder, with adapter_config.json."
    return ""


def _chosen(words: list[str], component: str | None, where: str) -> str:
    if words == [""] or (component is None and len(words) == 1):
        return words[0]
    if component is None:
        raise UserError(
            f"{where} is for several models of a pipeline ({', '.join(words)}), and an adapter is "
            f"for one. Name it: component='{words[0]}', --component {words[0]}."
        )
    if component not in words:
        raise UserError(f"{where} holds nothing for '{component}'; it has {', '.join(words)}.")
    return component


def _config(text: str | None, word: str, where: str) -> dict[str, object]:
    """What the LoraConfig in the metadata says for one model; empty where there is none."""
    if text is None:
        return {}
    raw = strict_json(text.encode("utf-8"), where, f"the entry '{METADATA_KEY}'")
    front = f"{word}." if word else ""
    said = {key.removeprefix(front): v for key, v in raw.items() if key.startswith(front)}
    problems = [
        f"{key} must map names to numbers."
        for key in ("rank_pattern", "alpha_pattern")
        if not isinstance(said.get(key) or {}, dict)
    ]
    gather(ArtifactError, f"{where}: the entry '{METADATA_KEY}' is damaged", problems)
    return {key: said[key] for key in _SAID if key in said}


def _scale(name: str, r: int, config: Mapping[str, object], alpha: float | None) -> float:
    """s of one module, by the file's own alpha, by the metadata, or 1."""
    if alpha is not None:
        return scaling(r, alpha)
    if "r" not in config:
        return 1.0
    ranks = cast("dict[str, int]", config.get("rank_pattern") or {})
    alphas = cast("dict[str, float]", config.get("alpha_pattern") or {})
    said = value_for(ranks, name, cast("int", config["r"]))
    if said != r:
        raise ArtifactError(f"its rank is {r}, and the metadata says {said}.")
    value = value_for(alphas, name, cast("float", config.get("lora_alpha", 8)))
    return scaling(r, value, config.get("use_rslora") is True)


def _kernel(both: Mapping[str, Tensor]) -> Kernel | None:
    a, b = both.get("A"), both.get("B")
    if a is None or b is None or a.ndim < 3:
        return None
    return Kernel(tuple(a.shape[1:]), a.shape[0] // max(b.shape[1], 1))
