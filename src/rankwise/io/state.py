"""Trained tensors of the methods without factors: a head, or the whole model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from rankwise.attaching import Attachment, attach, attachment
from rankwise.errors import ArtifactError, UserError, gather, nearest
from rankwise.io import files
from rankwise.io.base import name_of
from rankwise.io.peft_names import within
from rankwise.io.peft_places import mismatch
from rankwise.io.sketch import METADATA_KEY, Sketch, differences, sketch
from rankwise.io.tensors import read_tensors, shown, strict_json, write_tensors
from rankwise.layers import refusal
from rankwise.methods.full import Full
from rankwise.methods.head import HeadOnly
from rankwise.targets import sites

__all__ = ["CARD", "TRAINED", "load_trained", "save_trained"]

CARD = "rankwise.json"
TRAINED = "trained.safetensors"
MAX_CARD = 1_000_000  # bytes
_FORMAT = "rankwise-trained"
_VERSION = 1
_SKETCHED = 32  # weights of a frozen base that the sketch looks at


def save_trained(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model_name: str | None = None
) -> Path:
    """Write what HeadOnly or Full trained: rankwise.json and trained.safetensors.

    For HeadOnly these are the tensors of the trained copies and a sketch of the frozen base; for
    Full every parameter and every buffer that a checkpoint holds. The folder appears whole or not
    at all.

    Raises:
        UserError: nothing is attached, or a method of another kind; or a tensor is not finite.
        EnvironmentFault: the disk refuses.
    """
    record = attachment(model)
    method = record.method
    if not isinstance(method, HeadOnly | Full):
        raise UserError(f"{type(method).__name__} is not saved tensor by tensor.")
    name = base_model_name or name_of(model)
    modules = tuple(record.originals)
    tensors = _tensors(model, modules) if isinstance(method, HeadOnly) else _whole(model)
    broken = [shown(k) for k, t in tensors.items() if not bool(torch.isfinite(t).all())]
    gather(UserError, "The weights are not finite and are not saved; training diverged", broken)
    frozen = _frozen(model, modules) if isinstance(method, HeadOnly) else []
    card: dict[str, object] = {
        "format": _FORMAT,
        "version": _VERSION,
        "method": type(method).__name__,
        "base_model_name_or_path": name,
        "modules": list(modules),
        "modules_to_save": list(method.modules_to_save) if isinstance(method, HeadOnly) else [],
    }
    with files.folder(folder) as inside:
        metadata = {METADATA_KEY: sketch(model, frozen, name).to_json()}
        write_tensors(inside / TRAINED, tensors, metadata)
        files.write_json(inside / CARD, card)
    return Path(folder)


def load_trained(
    model: nn.Module, folder: str | os.PathLike[str], *, allow_nonfinite: bool = False
) -> Attachment:
    """Attach what :func:`save_trained` wrote; everything is checked before the model is touched.

    Full overwrites the weights of the model: it has no frozen base.

    Raises:
        UserError: there is no such folder, or the model carries a method already.
        ArtifactError: lists all that is wrong with the files or their fit to this model.
        EnvironmentFault: a file cannot be read.
    """
    home = Path(folder)
    card = _card(home / CARD)
    file = read_tensors(home / TRAINED, allow_nonfinite=allow_nonfinite)
    modules = cast("list[str]", card["modules"])
    head = card["method"] == HeadOnly.__name__
    table = sites(model)
    missing = [name for name in modules if name not in table]
    problems = [f"the model has no module '{n}'.{nearest(n, table)}" for n in missing]
    if not missing:
        wanted = _tensors(model, modules) if head else _whole(model)
        problems.extend(_unlike(file.tensors, wanted))
        text = file.metadata.get(METADATA_KEY)
        if text is not None:
            problems.extend(differences(Sketch.from_json(text, f"'{home / TRAINED}'"), model))
    base = card.get("base_model_name_or_path")
    made_for = f", made for '{base}'," if isinstance(base, str) else ""
    title = f"What was trained in '{home}'{made_for} does not fit this {type(model).__name__}"
    gather(ArtifactError, title, problems)
    method = _head_method(model, card, home) if head else Full()
    record = attach(model, method)
    with torch.no_grad():
        for name, tensor in (_tensors(model, modules) if head else _whole(model)).items():
            tensor.copy_(file.tensors[name])
    return record


def _tensors(model: nn.Module, modules: list[str] | tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of some modules as a checkpoint holds them, by full name; not copies."""
    return {
        f"{name}.{key}": tensor
        for name in modules
        for key, tensor in model.get_submodule(name).state_dict().items()
    }


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of the model, shared ones once; not copies."""
    seen: set[int] = set()
    kept = {k: t for k, t in model.state_dict(keep_vars=True).items() if not _again(t, seen)}
    return {key: tensor.detach() for key, tensor in kept.items()}


def _again(tensor: Tensor, seen: set[int]) -> bool:
    known = id(tensor) in seen
    seen.add(id(tensor))
    return known


def _frozen(model: nn.Module, trained: tuple[str, ...]) -> list[str]:
    """Up to 32 layers of the base outside the trained modules, evenly spread."""
    names = [
        name
        for name, site in sites(model).items()
        if refusal(site.module) is None and not within(name, trained)
    ]
    step = max(1, -(-len(names) // _SKETCHED))
    return names[::step]


def _card(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CARD + 1)
    except FileNotFoundError as error:
        raise files.missing(path) from error
    except OSError as error:
        raise files.read_fault(path, error) from error
    if len(content) > MAX_CARD:
        raise ArtifactError(f"'{path}' is larger than {MAX_CARD:,} bytes, which none of these is.")
    card = strict_json(content, f"'{path}'", "the file")
    problems: list[str] = []
    if card.get("format") != _FORMAT:
        problems.append(f"format must be '{_FORMAT}'.")
    if card.get("version") != _VERSION:
        problems.append(f"version must be {_VERSION}; a newer Rankwise may have written it.")
    if card.get("method") not in (HeadOnly.__name__, Full.__name__):
        problems.append(f"method must be '{HeadOnly.__name__}' or '{Full.__name__}'.")
    for key in ("modules", "modules_to_save"):
        value = card.get(key)
        if not isinstance(value, list) or not all(
            isinstance(v, str) for v in cast("list[object]", value)
        ):
            problems.append(f"{key} must be a list of names.")
    gather(ArtifactError, f"'{path}' cannot be used", problems)
    return card


def _unlike(have: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{shown(k)} is missing in the file." for k in wanted if k not in have]
    extra = [k for k in have if k not in wanted]
    problems.extend(
        f"{shown(k)} has no place in the model.{nearest(k[:200], wanted, 1) if i < 3 else ''}"
        for i, k in enumerate(extra)
    )
    pairs = ((k, mismatch(have[k], wanted[k])) for k in wanted if k in have)
    problems.extend(f"{shown(k)} {problem}" for k, problem in pairs if problem is not None)
    return problems


def _head_method(model: nn.Module, card: Mapping[str, object], home: Path) -> HeadOnly:
    """The method that trains the very modules of the file on this model."""
    method = HeadOnly(modules_to_save=tuple(cast("list[str]", card["modules_to_save"])))
    planned = [place.site.name for place in method.plan(model).placements]
    if planned != card["modules"]:
        raise ArtifactError(
            f"'{home / CARD}' lists the modules {card['modules']}, and on this "
            f"{type(model).__name__} the head and modules_to_save are {planned}."
        )
    return method
