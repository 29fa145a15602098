"""PEFT's folder without its base model: read by the names in the file, written by full names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from rankwise.errors import ArtifactError, gather
from rankwise.io import files
from rankwise.io.blueprint import Blueprint
from rankwise.io.holding import FORMATS, demand
from rankwise.io.json_files import read_json
from rankwise.io.peft import WEIGHTS
from rankwise.io.peft_alone_keys import ON_MODEL, Keys, ModelNeeded, sort_keys
from rankwise.io.peft_config import CONFIG, PeftConfig, read_config
from rankwise.io.peft_extras import Exact, bias_within
from rankwise.io.peft_forms import Convolution, Form, Linear
from rankwise.io.peft_keys import PREFIX
from rankwise.io.peft_layout import METADATA_KEY as LAYOUT
from rankwise.io.peft_layout import Notes, Share
from rankwise.io.peft_names import exact, patterns, value_for
from rankwise.io.pickles import ask_for_pickle, read_pickle
from rankwise.io.portable import Kernel, Portable, pairs
from rankwise.io.reforms import join_parts, without_starts
from rankwise.io.sketch import METADATA_KEY
from rankwise.io.tensors import TensorFile, read_tensors, shown, write_tensors
from rankwise.layers import Layout
from rankwise.lowrank import Factors, scaling
from rankwise.methods.adapter import Adapter
from rankwise.methods.lora import LoRA
from rankwise.methods.restate import restated

__all__ = ["read_peft_alone", "write_peft_alone"]

_PICKLED = "adapter_model.bin"
_TRAINED_KEY = "rankwise.trained"


def read_peft_alone(
    folder: str | os.PathLike[str],
    *,
    base: Blueprint | None = None,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
) -> Portable:
    """Read PEFT's folder with no model at hand, as strictly as the files alone allow.

    Every tensor must be understood, every update whole, its rank that of the configuration, and
    each adapted name one that target_modules means. Which modules target_modules means beyond
    these, and whether shapes fit, only the base can tell: ``rankwise.load_adapter`` asks it.
    A ``base`` here only tells copies of its tensors, which PEFT may save, from trained ones, and
    what was added to its biases. A folder with adapter_model.bin is read only with
    ``allow_pickle``.

    Raises:
        UserError: there is no such folder or file, or it is a pickle that was not asked for.
        ModelNeeded: only the base or the model can make sense of some of it.
        ArtifactError: lists all that is wrong.
        EnvironmentFault: a file cannot be read.
    """
    home = Path(folder)
    config = read_config(home / CONFIG)
    raw = read_json(home / CONFIG)
    if config.by_rankwise or config.parameters:
        raise ModelNeeded(
            f"The adapter in '{home}' has updates of weights that only the model can tell, such as "
            f"banks of experts. Read it {ON_MODEL}."
        )
    file = _tensors(home, allow_pickle, allow_nonfinite)
    told = _told(file.metadata.get(_TRAINED_KEY), home)
    layout = Notes.from_json(file.metadata.get(LAYOUT), f"'{home / WEIGHTS}'")
    tensors, _ = Exact.apart(file.tensors)
    keys = sort_keys(tensors, config.rule.modules_to_save, told, base)
    keys.problems.extend(_without_twins(keys, layout))
    flat, kernels, problems = _flattened(keys, config)
    shares = _started(layout, flat)
    problems = [*keys.problems, *problems, *_contradictions(keys, config)]
    problems.extend(_other_layout(shares, flat, config))
    gather(ArtifactError, f"The adapter in '{home}' cannot be used", problems)
    gather(
        ModelNeeded,
        f"The adapter in '{home}' cannot be read by itself. What --base does not tell is read "
        f"{ON_MODEL}",
        keys.needs,
    )
    adapter = _adapter(config, keys, pairs(flat, f"The adapter in '{home}'"), shares)
    if layout.tied:
        adapter = replace(adapter, method=replace(adapter.method, tied=True))
    return Portable(
        adapter,
        embeddings=frozenset(keys.embeddings),
        kernels=kernels,
        fused=tuple(name for name in layout.split if name in flat),
        transposed=raw.get("fan_in_fan_out") is True,
        base=config.base_model_name,
        task_type=task if isinstance(task := raw.get("task_type"), str) else None,
        sketch=file.metadata.get(METADATA_KEY),
        notes=tuple(keys.notes),
    )


def write_peft_alone(portable: Portable, folder: str | os.PathLike[str]) -> Portable:
    """Write PEFT's folder; target_modules are the full names of the adapted modules.

    Biases of adapted modules become PEFT's lora_bias, B's own bias Δb / s. The folder appears whole
    or not at all. Gives back what was written, with its notes.

    Raises:
        UserError: lists what PEFT's files cannot hold.
        ModelNeeded: lists what they cannot hold without the base.
        EnvironmentFault: the disk refuses.
    """
    demand(portable, FORMATS["peft"])
    begun = {n: f.r for n, f in portable.factors.items() if f.A0 is not None}
    portable = join_parts(without_starts(portable))
    problems = list(_biases_beyond(portable))
    gather(ModelNeeded, "PEFT's files cannot hold this adapter without its base", problems)
    packed = {n: form.pack({n: portable.factors[n]}) for n, form in _forms(portable).items()}
    tensors = {
        f"{PREFIX}{name}.{key}": tensor
        for name, pack in packed.items()
        for key, tensor in (*pack.tensors.items(), *_beside(portable, name))
    }
    tensors.update({PREFIX + name: t for name, t in portable.adapter.trained.items()})
    metadata = {_TRAINED_KEY: json.dumps(list(portable.adapter.modules))}
    own = {n: _share(portable.factors[n], r) for n, r in begun.items() if n in packed}
    if (layout := Notes(own).to_json()) is not None:
        metadata[LAYOUT] = layout
    if portable.sketch is not None:
        metadata[METADATA_KEY] = portable.sketch
    ranks = {name: pack.r for name, pack in packed.items()}
    config = _config(portable, ranks, {n: _alpha(portable, n, r) for n, r in ranks.items()})
    with files.folder(folder) as inside:
        write_tensors(inside / WEIGHTS, tensors, metadata)
        files.write_json(inside / CONFIG, config)
    return portable


def _tensors(home: Path, allow_pickle: bool, allow_nonfinite: bool) -> TensorFile:
    if (home / WEIGHTS).exists() or not (home / _PICKLED).exists():
        return read_tensors(home / WEIGHTS, allow_nonfinite=allow_nonfinite)
    ask_for_pickle(home / _PICKLED, allow_pickle)
    return TensorFile(read_pickle(home / _PICKLED, allow_nonfinite=allow_nonfinite), {})


def _told(text: str | None, home: Path) -> Sequence[str] | None:
    """The modules trained whole that Rankwise wrote into the metadata."""
    if text is None:
        return None
    try:
        names: object = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if isinstance(names, list) and all(isinstance(n, str) for n in cast("list[object]", names)):
        return cast("list[str]", names)
    raise ArtifactError(f"'{home / WEIGHTS}': the entry '{_TRAINED_KEY}' is damaged.")


def _flattened(
    keys: Keys, config: PeftConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Kernel], list[str]]:
    """Factors as matrices, the kernels they had, and what does not go with the configuration."""
    flat: dict[str, dict[str, Tensor]] = {}
    kernels: dict[str, Kernel] = {}
    problems: list[str] = []
    for name, both in keys.sides.items():
        r = value_for(config.rank_pattern, name, config.r)
        a, b = both.get("A"), both.get("B")
        kernel = None if a is None or b is None else _kernel(a, b)
        if kernel is None or a is None or b is None:
            flat[name] = _one_dtype(both)
        else:
            form = _convolution(name, b.shape[0], kernel)
            tensors = {"lora_A.weight": a, "lora_B.weight": b}
            if (misfit := form.misfit(tensors)) is not None:
                problems.append(f"the update of '{name}' {misfit}")
                continue
            down, up = form.unpack(tensors, {}, {})[name]
            kernels[name], flat[name] = kernel, {"A": down, "B": up}
        each = {"A": 1, "B": 1 if kernel is None else kernel.groups}
        for side, tensor in both.items():
            if tensor.ndim > 1 and tensor.shape[side == "B"] * each[side] != r:
                problems.append(
                    f"lora_{side} of '{name}' has shape {tuple(tensor.shape)}, and r is {r:,} in "
                    f"{CONFIG}."
                )
    return flat, kernels, problems


def _one_dtype(both: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rankwise may write a B that took up a scale in float64; it was trained in A's dtype."""
    narrow = [t.dtype for t in both.values() if t.dtype != torch.float64]
    dtype = narrow[0] if narrow else torch.float64
    return {s: t.to(dtype) if t.dtype == torch.float64 else t for s, t in both.items()}


def _kernel(a: Tensor, b: Tensor) -> Kernel | None:
    """The kernel of a convolution's update; None for a matrix, or for what is no update at all."""
    if a.ndim < 3 or a.ndim != b.ndim or not b.shape[1] or a.shape[0] % b.shape[1]:
        return None
    groups = a.shape[0] // b.shape[1]
    if a.shape[1] % groups or b.shape[0] % groups:
        return None
    return Kernel((a.shape[1] // groups, *a.shape[2:]), groups)


def _convolution(name: str, outputs: int, kernel: Kernel) -> Convolution:
    layout = Layout("weight", (outputs, *kernel.shape))
    return Convolution(name, name, {name: layout}, groups=kernel.groups)


def _forms(portable: Portable) -> dict[str, Form]:
    """PEFT's form of each update."""
    found: dict[str, Form] = {}
    for name, f in portable.factors.items():
        if name in portable.kernels:
            found[name] = _convolution(name, f.out_features, portable.kernels[name])
        else:
            places = {name: Layout("weight", (f.out_features, f.in_features))}
            found[name] = Linear(name, name, places, embedding=name in portable.embeddings)
    return found


def _contradictions(keys: Keys, config: PeftConfig) -> Iterator[str]:
    for name in keys.sides:
        if config.rule.target_modules != "all-linear" and not config.rule.targets(name):
            yield f"'{name}' is adapted, and target_modules does not mean it."
    for name in set(keys.sides) - set(keys.magnitudes) if config.dora else ():
        yield f"'{name}' has no lora_magnitude_vector, and use_dora is on."
    for name in set(keys.magnitudes) - set(keys.sides):
        yield f"'{name}' has a lora_magnitude_vector and no factors."
    for name in set(keys.b_biases) - set(keys.sides):
        yield f"'{name}' has a bias on B and no factors."


def _without_twins(keys: Keys, layout: Notes) -> Iterator[str]:
    """Take out the updates that Rankwise wrote once more for a tied module, or say what differs."""
    for twin, source in layout.tied.items():
        if twin not in keys.sides or source not in keys.sides:
            continue
        copy, own = keys.sides.pop(twin), keys.sides[source]
        keys.embeddings = [name for name in keys.embeddings if name != twin]
        a, b, A, B = (each.get(side) for each in (copy, own) for side in "AB")
        if a is None or b is None or A is None or B is None:
            yield f"'{twin}' or '{source}' lacks a factor, and they are tied."
        elif not (_same(a, A) and _same(b, B)) and not (_same(a, B.mT) and _same(b, A.mT)):
            yield f"'{twin}' and '{source}' are tied, and the file has another update for each."


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _started(layout: Notes, names: Iterable[str]) -> dict[str, Share]:
    """What Rankwise noted of the updates that end in their start."""
    noted = {name: layout.shares[name] for name in names if name in layout.shares}
    return {name: share for name, share in noted.items() if share.start}


def _other_layout(
    shares: Mapping[str, Share], flat: Mapping[str, Mapping[str, Tensor]], config: PeftConfig
) -> Iterator[str]:
    """Where the notes on a start do not go with the tensors or the configuration."""
    stable = config.rank_stabilized
    for name, share in shares.items():
        rows = (0, len(flat[name]["A"])) if "A" in flat[name] else share.rows
        r = value_for(config.rank_pattern, name, config.r)
        scale = scaling(r, value_for(config.alpha_pattern, name, config.alpha), stable)
        if rows != share.rows or not math.isclose(scale, share.scale(stable), rel_tol=1e-9):
            yield (
                f"{LAYOUT} tells of another rank, start or scale of '{name}' than the file and "
                f"{CONFIG} have: one of the two was changed."
            )


def _adapter(
    config: PeftConfig,
    keys: Keys,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    shares: Mapping[str, Share],
) -> Adapter:
    names = [*factors, *keys.modules]
    spelled = exact(names, names)
    r_of = {n: value_for(config.rank_pattern, n, config.r) for n in factors}
    alphas = {n: float(value_for(config.alpha_pattern, n, config.alpha)) for n in factors}
    method = LoRA(
        r=config.r,
        alpha=config.alpha,
        target_modules=tuple(spelled[n] for n in factors),
        rank_stabilized=config.rank_stabilized,
        rank_pattern={spelled[n]: r for n, r in r_of.items() if r != config.r},
        alpha_pattern={spelled[n]: a for n, a in alphas.items() if a != config.alpha},
        dropout=config.dropout,
        dora=bool(keys.magnitudes),
        bias="adapted" if keys.b_biases else "all" if keys.biases else "none",
        tied=config.tied,
        head="freeze",
        modules_to_save=tuple(spelled[n] for n in keys.modules),
    )
    made = {
        n: shares[n].factors(a, b, shares[n].scale(config.rank_stabilized))
        if n in shares
        else Factors(a, b, method.spec(n).scale)
        for n, (a, b) in factors.items()
    }
    if {n: f.r for n, f in made.items()} != r_of:  # with a start, or of a convolution in groups
        method = restated(method, made)
    on_b = {f"{n}.bias": (b.double() * made[n].scale).float() for n, b in keys.b_biases.items()}
    return Adapter(
        method,
        made,
        tuple(keys.modules),
        keys.trained,
        magnitudes={n: m.reshape(-1) for n, m in keys.magnitudes.items()},
        biases={**keys.biases, **on_b},
    )


def _biases_beyond(portable: Portable) -> Iterator[str]:
    adapter = portable.adapter
    plain = set(adapter.factors) - portable.embeddings - set(portable.kernels)
    other = [name for name in adapter.biases if name.removesuffix(".bias") not in plain]
    remedy = f"It can be written {ON_MODEL}."
    if other:
        yield (
            f"the bias {shown(other[0])} trained, which is none of an adapted linear layer, and "
            f"PEFT stores such a bias by its value. {remedy}"
        )
    elif adapter.biases and (adapter.magnitudes or plain != set(adapter.factors)):
        yield f"PEFT has a bias on B only where all updates are of linear layers. {remedy}"


def _share(pair: Factors, r: int) -> Share:
    """What is noted of the pair [A; A0], [B, −B0] of a start, so that it can be taken apart."""
    return Share(r, pair.scale * r, (0, pair.r), pair.r - r)


def _beside(portable: Portable, name: str) -> Iterator[tuple[str, Tensor]]:
    """What stands beside A and B of a module: its magnitude and the bias on B."""
    adapter, f = portable.adapter, portable.factors[name]
    kernel = portable.kernels.get(name)
    if name in adapter.magnitudes:
        m = adapter.magnitudes[name]
        ones = () if kernel is None else (1,) * len(kernel.shape[1:])
        yield "lora_magnitude_vector", m if kernel is None else m.reshape(1, -1, *ones)
    if adapter.biases:
        added = adapter.biases.get(f"{name}.bias", f.B.new_zeros(f.out_features))
        yield "lora_B.bias", bias_within(added, f.scale).to(f.B.dtype)


def _alpha(portable: Portable, name: str, r: int) -> float:
    """α for the rank that PEFT is told, which for a convolution in groups is another than ours."""
    spec = portable.adapter.method.spec(name)
    if r == spec.r:
        return spec.alpha
    return spec.scale * (math.sqrt(r) if spec.rank_stabilized else r)


def _config(
    portable: Portable, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, object]:
    """The content of adapter_config.json."""
    adapter = portable.adapter
    r, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns(alphas)
    return {
        "peft_type": "LORA",
        "task_type": portable.task_type,
        "base_model_name_or_path": portable.base,
        "revision": None,
        "r": r,
        "lora_alpha": _plain(alpha),
        "target_modules": sorted(ranks),
        "exclude_modules": None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {key: _plain(value) for key, value in alpha_pattern.items()},
        "use_rslora": adapter.method.rank_stabilized,
        "use_dora": bool(adapter.magnitudes),
        "lora_bias": bool(adapter.biases),
        "lora_dropout": adapter.method.dropout,
        "bias": "none",
        "fan_in_fan_out": portable.transposed,
        "modules_to_save": sorted(adapter.modules) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _plain(number: float) -> float | int:
    """16.0 as 16, which is how everybody writes alpha."""
    return int(number) if number == int(number) else number
