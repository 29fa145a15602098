"""PEFT's adapter folder: written so that every reader agrees, read so that nothing is lost."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from rankwise.errors import ArtifactError, UserError, gather
from rankwise.io import files
from rankwise.io.base import Base
from rankwise.io.peft_config import CONFIG, PeftConfig, read_config
from rankwise.io.peft_names import Rule, entries, exact, patterns, saved_entries, value_for, within
from rankwise.io.peft_places import (
    PREFIX,
    Places,
    factor_key,
    incomplete,
    misfits,
    place,
)
from rankwise.io.sketch import METADATA_KEY, Sketch, agree, differences
from rankwise.io.tensors import TensorFile, read_tensors, shown, write_tensors
from rankwise.lowrank import Factors
from rankwise.methods.adapter import Adapter
from rankwise.methods.head import outermost
from rankwise.methods.lora import LoRA
from rankwise.targets import ALL_LINEAR, Site, select, sites

__all__ = ["WEIGHTS", "peft_config", "read_peft", "write_peft"]

WEIGHTS = "adapter_model.safetensors"
_TRAINED_KEY = "rankwise.trained"


def write_peft(
    adapter: Adapter, folder: str | os.PathLike[str], base: Base, *, revision: str | None = None
) -> Path:
    """Write an adapter as PEFT's folder: adapter_config.json and adapter_model.safetensors.

    PEFT and transformers load it, and it has every key that vLLM, SGLang and the converters ask for
    (read in their sources, not run). The tensors are as they are in
    memory, float32 as a rule. What Rankwise adds lies in the metadata of the safetensors file,
    which the others ignore: the sketch of the base and the list of modules trained whole.
    Base weights are not written, but for modules whose names PEFT cannot tell from those of
    modules trained whole (:attr:`rankwise.io.base.Base.bystanders`).

    The folder appears whole or not at all, in the place of what was there.

    Raises:
        UserError: the adapter holds NaN or infinity, or names that PEFT's format cannot tell apart.
        EnvironmentFault: the disk refuses.
    """
    tensors = dict(_tensors(adapter, base))
    broken = [shown(k) for k, t in tensors.items() if not bool(torch.isfinite(t).all())]
    gather(UserError, "The adapter is not finite and is not saved; training diverged", broken)
    config = peft_config(adapter, base, revision=revision)
    metadata = {
        METADATA_KEY: base.sketch.to_json(),
        _TRAINED_KEY: json.dumps(list(adapter.modules)),
    }
    with files.folder(folder) as inside:
        write_tensors(inside / WEIGHTS, tensors, metadata)
        files.write_json(inside / CONFIG, config)
    return Path(folder)


def peft_config(adapter: Adapter, base: Base, *, revision: str | None = None) -> dict[str, object]:
    """The content of adapter_config.json, checked to mean this adapter and no other.

    Training may call this before the first step, to learn early that a model's names cannot be
    expressed.

    Raises:
        UserError: PEFT's matching rules cannot name these modules exactly, or the method's r and
            alpha are not those of the factors.
    """
    specs = {name: adapter.method.spec(name) for name in adapter.factors}
    gather(UserError, "The adapter contradicts itself", list(_contradictions(adapter)))
    r, rank_pattern = patterns({name: spec.r for name, spec in specs.items()})
    alpha, alpha_pattern = patterns({name: spec.alpha for name, spec in specs.items()})
    saved = saved_entries(adapter.modules, base.names)
    outside = [n for n in base.names if not within(n, adapter.modules)]
    target_modules = entries(specs, outside)
    rule = Rule(target_modules, modules_to_save=saved)
    whole = [n for n in base.names if rule.saves(n)]
    lost = [
        shown(n)
        for n in base.names
        if rule.targets(n) != (n in specs) or (n in specs and within(n, whole))
    ]
    gather(
        UserError,
        f"PEFT's format cannot express this adapter: modules_to_save {list(saved)} also takes in, "
        "by PEFT's rule, modules that are adapted. Rename the module that trains whole, or do "
        "not adapt these",
        lost,
    )
    linear = [name for name in specs if name not in base.embeddings]
    return {
        "peft_type": "LORA",
        "task_type": base.task_type,
        "base_model_name_or_path": base.name,
        "revision": revision,
        "r": r,
        "lora_alpha": _plain(alpha),
        "target_modules": target_modules if isinstance(target_modules, str) else [*target_modules],
        "exclude_modules": None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {key: _plain(value) for key, value in alpha_pattern.items()},
        "use_rslora": adapter.method.rank_stabilized,
        "use_dora": False,
        "lora_dropout": adapter.method.dropout,
        "bias": "none",
        "fan_in_fan_out": bool(linear) and all(name in base.transposed for name in linear),
        "modules_to_save": [*saved] or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read_peft(
    folder: str | os.PathLike[str], model: nn.Module, *, allow_nonfinite: bool = False
) -> Adapter:
    """Read PEFT's folder for a model, strictly; the model is only looked at.

    Every tensor of the file must have its place, every module that ``target_modules`` means on
    this model must be filled, rank, alpha, shapes and dtypes must agree, and where the file tells
    about its base (Rankwise's sketch, or embedding weights that PEFT adds) it must be this one.

    Raises:
        UserError: there is no such folder or file.
        ArtifactError: lists all that is wrong with the adapter or its fit to this model.
        EnvironmentFault: a file cannot be read.
    """
    home = Path(folder)
    config = read_config(home / CONFIG)
    _refuse_pickle(home)
    file = read_tensors(home / WEIGHTS, allow_nonfinite=allow_nonfinite)
    table = sites(model)
    rule = _resolved(config.rule, model)
    expected = [name for name in table if rule.targets(name)]
    told = file.metadata.get(_TRAINED_KEY)
    whole = _outermost(rule, table) if told is None else _told(told, home / WEIGHTS)
    places = place(file.tensors, table, expected, whole)
    ranks = {n: value_for(config.rank_pattern, n, config.r) for n in places.adapted()}
    problems = [
        *_other_base(places, file, home / WEIGHTS, model),
        *places.problems,
        *misfits(places, table, ranks),
        *incomplete(places, table, whole),
    ]
    made_for = f", made for '{config.base_model_name}'," if config.base_model_name else ""
    title = f"The adapter in '{home}'{made_for} does not fit this {type(model).__name__}"
    gather(ArtifactError, title, problems)
    return _adapter(config, places, whole, list(table))


def _tensors(adapter: Adapter, base: Base) -> Iterator[tuple[str, Tensor]]:
    for name, factors in adapter.factors.items():
        for side, tensor in (("A", factors.A), ("B", factors.B)):
            yield factor_key(name, side, embedding=name in base.embeddings), tensor
    for name, tensor in {**base.bystanders, **(adapter.trained or {})}.items():
        yield PREFIX + name, tensor


def _contradictions(adapter: Adapter) -> Iterator[str]:
    for name, factors in adapter.factors.items():
        spec = adapter.method.spec(name)
        if spec.r != factors.r or not math.isclose(spec.scale, factors.scale):
            yield (
                f"'{name}': its factors have rank {factors.r} and scale {factors.scale:g}, and its "
                f"method says {spec.r} and {spec.scale:g}."
            )


def _plain(number: float) -> float | int:
    """16.0 as 16, which is how everybody writes alpha."""
    return int(number) if number == int(number) else number


def _refuse_pickle(home: Path) -> None:
    if (home / WEIGHTS).exists():
        return
    pickles = [p.name for end in ("bin", "pt", "pth") for p in home.glob(f"adapter_model*.{end}")]
    if pickles:
        raise ArtifactError(
            f"'{home}' holds '{pickles[0]}' and no '{WEIGHTS}'. A pickle can run any code when it "
            "is opened, so Rankwise does not open it. Convert to safetensors where the file is "
            "trusted: load it with PEFT and call save_pretrained(folder)."
        )


def _resolved(rule: Rule, model: nn.Module) -> Rule:
    """The rule with "all-linear" replaced by the names it stands for on this model."""
    if rule.target_modules != ALL_LINEAR:
        return rule
    return replace(rule, target_modules=tuple(s.name for s in select(model, (ALL_LINEAR,))))


def _outermost(rule: Rule, table: Mapping[str, Site]) -> list[str]:
    """Names of the modules that the configuration alone says train whole, the outermost of each."""
    saved = [n for n, site in table.items() if rule.saves(n) and site.module.state_dict()]
    return outermost(saved)


def _told(text: str, path: Path) -> list[str]:
    """The list of modules trained whole that :func:`write_peft` put into the metadata."""
    try:
        names: object = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if isinstance(names, list) and all(isinstance(n, str) for n in cast("list[object]", names)):
        return cast("list[str]", names)
    raise ArtifactError(f"'{path}': the entry '{_TRAINED_KEY}' of its metadata is damaged.")


def _other_base(places: Places, file: TensorFile, path: Path, model: nn.Module) -> Iterator[str]:
    """What tells that the adapter was made on other weights than this model's."""
    text = file.metadata.get(METADATA_KEY)
    if text is not None:
        yield from differences(Sketch.from_json(text, f"'{path}'"), model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in places.base.items():
        if not agree(tensor, parameters[name]):
            yield (
                f"it carries a base tensor {tuple(tensor.shape)} for '{name}' that is not the one "
                "of this model: the base was another, or this was resized or trained as well. "
                "Rankwise does not replace base weights; load that base first."
            )


def _adapter(config: PeftConfig, places: Places, whole: list[str], names: list[str]) -> Adapter:
    """The neutral value, its method naming exactly these modules."""
    adapted = [name for name in names if places.sides(name)]
    spelled = {name: exact(name, names) for name in (*adapted, *whole)}
    ranks = {n: value_for(config.rank_pattern, n, config.r) for n in adapted}
    alphas = {n: float(value_for(config.alpha_pattern, n, config.alpha)) for n in adapted}
    method = LoRA(
        r=config.r,
        alpha=config.alpha,
        target_modules=tuple(spelled[n] for n in adapted),
        rank_stabilized=config.rank_stabilized,
        rank_pattern={spelled[n]: r for n, r in ranks.items() if r != config.r},
        alpha_pattern={spelled[n]: a for n, a in alphas.items() if a != config.alpha},
        dropout=config.dropout,
        head="freeze",
        modules_to_save=tuple(spelled[n] for n in whole),
    )
    factors = {
        n: Factors(places.sides(n)["A"], places.sides(n)["B"], method.spec(n).scale)
        for n in adapted
    }
    return Adapter(method, factors, tuple(whole), places.trained)
