"""Trained tensors of the methods without factors, and the card that tells which method it was."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from rankwise.attaching import Attachment, Method, attach, attachment, rehearse, updates_of
from rankwise.errors import ArtifactError, UserError, gather, nearest
from rankwise.io import files
from rankwise.io.base import name_of
from rankwise.io.cards import KINDS, card_of, method_of, read_card
from rankwise.io.peft_names import within
from rankwise.io.peft_places import mismatch
from rankwise.io.sketch import METADATA_KEY, Sketch, differences, own_modules, sketch
from rankwise.io.tensors import all_finite, read_tensors, shown, write_tensors
from rankwise.layers import Prefix, Update, refusal
from rankwise.methods.full import Full
from rankwise.targets import sites

__all__ = ["CARD", "TRAINED", "load_trained", "save_trained"]

CARD = "rankwise.json"
TRAINED = "trained.safetensors"
_SKETCHED = 32  # weights of a frozen base that the sketch looks at


def save_trained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    base_model_name: str | None = None,
) -> Path:
    """Write what a method without factors trained: rankwise.json and trained.safetensors.

    These are the tensors of the trained copies and of the updates, and a sketch of the frozen
    base; for Full every parameter and every buffer that a checkpoint holds. The folder appears
    whole or not at all.

    Raises:
        UserError: nothing is attached, or a method of another kind; or a tensor is not finite.
        EnvironmentFault: the disk refuses.
    """
    record = attachment(model, name)
    method = record.method
    if not isinstance(method, KINDS):
        raise UserError(f"{type(method).__name__} is not saved tensor by tensor.")
    called = base_model_name or name_of(model)
    modules = tuple(record.copies)
    tensors = _held(model, method, record.copies, updates_of(model, record.name))
    broken = [shown(k) for k, t in tensors.items() if not all_finite(t)]
    gather(UserError, "The weights are not finite and are not saved; training diverged", broken)
    frozen = [] if isinstance(method, Full) else _frozen(model, modules)
    with files.folder(folder) as inside:
        metadata = {METADATA_KEY: sketch(model, frozen, called).to_json()}
        write_tensors(inside / TRAINED, tensors, metadata)
        files.write_json(inside / CARD, card_of(method, called, modules))
    return Path(folder)


def load_trained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    allow_nonfinite: bool = False,
) -> Attachment:
    """Attach what :func:`save_trained` wrote; everything is checked before the model is touched.

    Full overwrites the weights of the model: it has no frozen base.

    Raises:
        UserError: there is no such folder, or the model carries a method already.
        ArtifactError: lists all that is wrong with the files or their fit to this model.
        EnvironmentFault: a file cannot be read.
    """
    home = Path(folder)
    card = read_card(home / CARD)
    file = read_tensors(home / TRAINED, allow_nonfinite=allow_nonfinite)
    method = method_of(card, home / CARD)
    modules = cast("list[str]", card["modules"])
    own = own_modules(model)
    missing = [n for n in modules if n not in own]
    problems = [f"the model has no module '{n}'.{nearest(n, own)}" for n in missing]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):  # what a method draws at its start is overwritten
        if not missing:
            updates = _planned(model, method, modules, home)
            wanted = _held(model, method, {n: own[n] for n in modules}, updates)
            problems.extend(_unlike(file.tensors, wanted))
            text = file.metadata.get(METADATA_KEY)
            if text is not None:
                problems.extend(differences(Sketch.from_json(text, f"'{home / TRAINED}'"), model))
        base = card.get("base_model_name_or_path")
        made_for = f", made for '{base}'," if isinstance(base, str) else ""
        title = f"What was trained in '{home}'{made_for} does not fit this {type(model).__name__}"
        gather(ArtifactError, title, problems)
        record = attach(model, method, name=name)
    with torch.no_grad():
        held = _held(model, method, record.copies, updates_of(model, name))
        for key, tensor in held.items():
            tensor.copy_(file.tensors[key])
    return record


def _planned(
    model: nn.Module, method: Method, modules: Sequence[str], home: Path
) -> dict[str, Update]:
    """The updates of a method on this model; its trained copies must be those of the file."""
    try:
        plan = method.plan(model)
    except UserError as error:
        raise ArtifactError(f"What was trained in '{home}' does not fit: {error}") from error
    planned = [place.site.name for place in plan.placements]
    if planned != list(modules):
        raise ArtifactError(
            f"'{home / CARD}' lists the modules {modules}, and on this {type(model).__name__} the "
            f"head and modules_to_save are {planned}."
        )
    return rehearse(plan)


def _held(
    model: nn.Module,
    method: Method,
    copies: Mapping[str, nn.Module],
    updates: Mapping[str, Update],
) -> dict[str, Tensor]:
    """What a file of this method holds, by name; not copies, but for prefixes that are grown."""
    if isinstance(method, Full):
        return _whole(model)
    found = _tensors(copies)
    for name, update in updates.items():
        own = _prefix(update) if isinstance(update, Prefix) else update.state_dict()
        found.update({f"{name}.{key}": tensor for key, tensor in own.items()})
    return found


def _prefix(update: Prefix) -> dict[str, Tensor]:
    keys, values = update.pair()
    return {"keys": keys.detach(), "values": values.detach()}


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of some modules as a checkpoint holds them, by full name; not copies."""
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
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
        if refusal(site.base) is None and not within(name, trained)
    ]
    step = max(1, -(-len(names) // _SKETCHED))
    return names[::step]


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
