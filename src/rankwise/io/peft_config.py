"""adapter_config.json: every key that is written, and what is believed or refused when reading."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from rankwise.errors import ArtifactError, gather
from rankwise.io.json_files import read_json
from rankwise.io.peft_names import Rule
from rankwise.io.tensors import shown

__all__ = ["CONFIG", "OURS", "PeftConfig", "read_config"]

CONFIG = "adapter_config.json"

OURS = "RANKWISE_LORA"  # peft_type of what PEFT has no form for, so that PEFT refuses the file
_MERGE = "Merge it with PEFT (merge_and_unload) and use the merged model."
_REPLACE = "Use it with PEFT, or train an adapter without it."
# Options that change what an adapter computes and that Rankwise has no layer for: why, and the way.
_UNSUPPORTED = {
    "layer_replication": (
        "the base is to be rebuilt with some of its blocks repeated",
        "Build that base first, save it, set layer_replication to null and load the adapter on it.",
    ),
    "alora_invocation_tokens": ("an activated LoRA acts on a part of each text only", _REPLACE),
    "use_qalora": ("QALoRA pools the inputs of a quantised layer in groups", _REPLACE),
    "use_bdlora": ("BD-LoRA has block-diagonal factors", _MERGE),
    "velora_config": ("VeLoRA adds tensors of its own", _MERGE),
    "monteclora_config": ("MonteCLoRA adds samplers of its factors", _MERGE),
    "kasa_config": ("KaSA takes a part of the base's weights away", _MERGE),
    "arrow_config": (
        "Arrow routes among several adapters",
        "Load the adapters that it routes among, each by itself.",
    ),
    "megatron_config": (
        "the layers of Megatron are split over processes",
        "Use it in Megatron; Rankwise adapts layers that are whole.",
    ),
}
_STARTS_BESIDE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
_STARTS_IN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BIASES = ("none", "lora_only", "all")
_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
# Read below, or without effect on what the adapter computes once it is trained.
# fmt: off
_KNOWN = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
))
# fmt: on


@dataclass(frozen=True)
class PeftConfig:
    """What a PEFT configuration says.

    Attributes:
        rule: which modules are adapted and which train whole.
        r: rank where ``rank_pattern`` says nothing else.
        alpha: α where ``alpha_pattern`` says nothing else.
        rank_pattern: rank by key; :func:`rankwise.io.peft_names.value_for` reads it.
        alpha_pattern: α by key.
        rank_stabilized: s = α/√r in place of α/r.
        dropout: of the training that made the adapter.
        dora: whether each update has a magnitude.
        bias: which biases of the base trained: "none", "lora_only" or "all".
        lora_bias: whether each B has a bias.
        parameters: adapted parameters, by their names or ends of these after a dot.
        tokens: ids of trained rows, by the end of an embedding's name; None is the input's.
        tied: whether layers that share a weight share their update.
        by_rankwise: whether only Rankwise has the forms that the file uses.
        base_model_name: what the base was called there.
    """

    rule: Rule
    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool = False
    dropout: float = 0.0
    dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    parameters: tuple[str, ...] = ()
    tokens: Mapping[str | None, tuple[int, ...]] = field(
        default_factory=dict[str | None, tuple[int, ...]]
    )
    tied: bool = False
    by_rankwise: bool = False
    base_model_name: str | None = None


def read_config(path: Path) -> PeftConfig:
    """Read an adapter_config.json, or list all that is wrong with it.

    Nothing is guessed: r and lora_alpha must be there (PEFT takes 8 for a missing lora_alpha),
    every key must be known or switched off, and what Rankwise has no layer for is refused by name.

    Raises:
        UserError: there is no such file.
        ArtifactError: the file is damaged, no LoRA, or says something Rankwise cannot honour.
        EnvironmentFault: it cannot be read.
    """
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind not in ("LORA", OURS):
        said = f"peft_type is {_value(kind)}" if "peft_type" in raw else "it has no peft_type"
        raise ArtifactError(
            f"'{path}' does not describe a LoRA adapter: {said}, and 'LORA' is needed."
        )
    gather(ArtifactError, f"'{path}' cannot be used", list(_problems(raw)))
    layers = raw.get("layers_to_transform")
    return PeftConfig(
        rule=Rule(
            target_modules=_names(raw.get("target_modules") or ()),
            exclude_modules=_names(raw.get("exclude_modules") or ()),
            modules_to_save=tuple(cast("list[str]", raw.get("modules_to_save") or ())),
            layers=(layers,) if isinstance(layers, int) else tuple(cast("list[int]", layers or ())),
            layers_pattern=_listed(raw.get("layers_pattern") or ()),
        ),
        r=cast("int", raw["r"]),
        alpha=float(cast("float", raw["lora_alpha"])),
        rank_pattern=cast("dict[str, int]", raw.get("rank_pattern") or {}),
        alpha_pattern=cast("dict[str, float]", raw.get("alpha_pattern") or {}),
        rank_stabilized=raw.get("use_rslora") is True,
        dropout=float(cast("float", raw.get("lora_dropout") or 0.0)),
        dora=raw.get("use_dora") is True,
        bias=cast("str", raw.get("bias") or "none"),
        lora_bias=raw.get("lora_bias") is True,
        parameters=tuple(cast("list[str]", raw.get("target_parameters") or ())),
        tokens=_tokens(raw.get("trainable_token_indices")),
        tied=raw.get("ensure_weight_tying") is True,
        by_rankwise=kind == OURS,
        base_model_name=name
        if isinstance(name := raw.get("base_model_name_or_path"), str)
        else None,
    )


def _problems(raw: dict[str, object]) -> Iterator[str]:
    yield from _foreign_keys(raw)
    yield from _numbers(raw)
    yield from _choices(raw)
    yield from _switches(raw)
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_STARTS_IN_BASE):
        yield (
            f"init_lora_weights is {_value(start)}: this start changed the base's own weights, so "
            "these A and B do not belong to the plain base. Convert the adapter with PEFT, "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...), and load that."
        )
    elif start not in _STARTS_BESIDE_BASE and start is not None:
        yield f"init_lora_weights is {_value(start)}, a start that Rankwise does not know."


def _foreign_keys(raw: dict[str, object]) -> Iterator[str]:
    for key, value in raw.items():
        if key in _CODE:
            yield f"{shown(key)} asks for code from elsewhere to be run; that is refused."
        elif key in _UNSUPPORTED:
            if value not in (None, False, {}, []):
                why, remedy = _UNSUPPORTED[key]
                yield f"{key} is on: {why}, which Rankwise has no layer for. {remedy}"
        elif key not in _KNOWN and value not in (None, False, {}, [], ""):
            yield (
                f"{shown(key)} is {_value(value)}, and Rankwise does not know this key, which may "
                "change what the adapter computes. Remove it if it does not."
            )


def _numbers(raw: dict[str, object]) -> Iterator[str]:
    if "r" not in raw:
        yield "r is missing; it is the rank, such as 8."
    elif not _is_rank(raw["r"]):
        yield f"r must be a whole number of 1 or more, and is {_value(raw['r'])}."
    if "lora_alpha" not in raw:
        yield (
            "lora_alpha is missing, and the update is scaled by lora_alpha / r: without it the "
            "adapter has no known strength. Add the value it was trained with."
        )
    elif not _is_alpha(raw["lora_alpha"]):
        yield f"lora_alpha must be a finite number above 0, and is {_value(raw['lora_alpha'])}."
    checks = {"rank_pattern": _is_rank, "alpha_pattern": _is_alpha}
    for option, fits in checks.items():
        value = raw.get(option)
        if value is None:
            continue
        if not isinstance(value, dict):
            yield f"{option} must map names to numbers, and is {_value(value)}."
            continue
        for key, number in cast("dict[str, object]", value).items():
            if not fits(number):
                yield f"{option}: {shown(key)} is {_value(number)}, not a number above 0."
    dropout = raw.get("lora_dropout")
    if dropout is not None and not (_is_number(dropout) and 0 <= cast("float", dropout) < 1):
        yield f"lora_dropout must be at least 0 and below 1, and is {_value(dropout)}."


def _choices(raw: dict[str, object]) -> Iterator[str]:
    target = raw.get("target_modules")
    elsewhere = bool(raw.get("target_parameters")) or raw.get("peft_type") == OURS
    if not target and not elsewhere:
        yield (
            "target_modules is missing: without it nothing tells which layers the adapter must "
            "fill. Add the names of the adapted modules."
        )
    elif target and not isinstance(target, str) and not _is_texts(target):
        yield f"target_modules must be a list of names or one pattern, and is {_value(target)}."
    for option in ("exclude_modules", "layers_pattern"):
        value = raw.get(option)
        if value is not None and not isinstance(value, str) and not _is_texts(value):
            yield f"{option} must be a list of names or one pattern, and is {_value(value)}."
    for option in ("modules_to_save", "target_parameters"):
        value = raw.get(option)
        if value is not None and not _is_texts(value):
            yield f"{option} must be a list of names, and is {_value(value)}."
    layers = raw.get("layers_to_transform")
    numbers = cast("list[object]", layers) if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(n) is int for n in numbers):
        yield f"layers_to_transform must be whole numbers, and is {_value(layers)}."


def _switches(raw: dict[str, object]) -> Iterator[str]:
    for option in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
        if not isinstance(raw.get(option), bool | None):
            yield f"{option} must be true or false, and is {_value(raw[option])}."
    if raw.get("bias") not in (None, *_BIASES):
        yield f"bias must be one of {', '.join(_BIASES)}, and is {_value(raw['bias'])}."
    tokens = raw.get("trainable_token_indices")
    lists: list[object] = [tokens]
    if isinstance(tokens, dict):
        lists = list(cast("dict[str, object]", tokens).values())
    if tokens is not None and not all(_is_ids(ids) for ids in lists):
        yield (
            "trainable_token_indices must be a list of different whole numbers from 0, or such "
            f"lists by the names of embeddings, and is {_value(tokens)}."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: object) -> bool:
    if not _is_number(value):
        return False
    try:
        number = float(cast("float", value))
    except OverflowError:
        return False
    return math.isfinite(number) and number > 0


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, str) and v for v in cast("list[object]", value)
    )


def _is_ids(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    ids = cast("list[object]", value)
    whole = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**62]
    return len(set(whole)) == len(ids)


def _tokens(value: object) -> dict[str | None, tuple[int, ...]]:
    if not value:
        return {}
    if isinstance(value, list):
        return {None: tuple(cast("list[int]", value))}
    return {name: tuple(ids) for name, ids in cast("dict[str, list[int]]", value).items()}


def _names(value: object) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(cast("list[str]", value))


def _listed(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(cast("list[str]", value))


def _value(value: object) -> str:
    """A value from the file as JSON, not too long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:50] + "..."
