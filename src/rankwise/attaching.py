"""attach and detach on any nn.Module: what is put in, what trains, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import nn

from rankwise.errors import UserError
from rankwise.layers import LoRALayer
from rankwise.targets import Site, sites

__all__ = [
    "Attachment",
    "Method",
    "Placement",
    "Plan",
    "adapted_sites",
    "attach",
    "attachment",
    "base",
    "detach",
    "forget",
    "lora_layers",
    "note_kept",
    "trained_copies",
    "unmerged",
]

_RECORD = "_rankwise_attachment"


@dataclass(frozen=True)
class Placement:
    """One module to be put into a model in the place of another.

    Attributes:
        site: where.
        build: makes the new module from the one that is there now: a layer around it, or a copy
            of it that trains. What it builds trains; what it was built from is frozen and kept.
    """

    site: Site
    build: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Plan:
    """What a method will do to a model, decided before anything is touched.

    Attributes:
        method: the value that asked for it.
        placements: modules to put in.
        trained: names of the base's own parameters that train in place (full fine-tuning).
        notes: what the user should be told, one sentence each.
    """

    method: Method
    placements: tuple[Placement, ...] = ()
    trained: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Method(Protocol):
    """What may train: a frozen value that makes a :class:`Plan` for a model."""

    def plan(self, model: nn.Module) -> Plan: ...


@dataclass(frozen=True)
class Attachment:
    """The record that :func:`attach` leaves on a model.

    Attributes:
        method: the value that was attached.
        adapted: names of the modules that carry an update.
        originals: the base's own modules that a trained copy stands for, by name.
        notes: what the user should be told.
        required_grad: names of the parameters that required gradients before.
        kept: while the update is merged, the plain module that stands in the place of each
            adapted layer and that layer itself, by name; None while nothing is merged.
    """

    method: Method
    adapted: tuple[str, ...]
    originals: Mapping[str, nn.Module]
    notes: tuple[str, ...]
    required_grad: frozenset[str] = field(repr=False)
    kept: Mapping[str, tuple[nn.Module, LoRALayer]] | None = field(default=None, repr=False)


def attach(model: nn.Module, method: Method) -> Attachment:
    """Put a method on a model in place: freeze the base, add the layers, free what trains.

    The step-0 function is the base's, bit for bit, and no base weight is written, then or later
    (full fine-tuning apart, which trains the base itself). :func:`detach` is the inverse.

    Returns the record of what was done; its ``notes`` say what a user should know, such as that
    the head trains.

    Raises:
        UserError: the model or a part of it carries a method already, or the plan cannot be
            carried out; the model is then as it was.
    """
    _refuse_second(model)
    plan = method.plan(model)
    built = [(place.site, place.build(place.site.module)) for place in plan.placements]
    for _, module in built:
        if not isinstance(module, LoRALayer):
            module.requires_grad_(True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    required = frozenset(n for n, p in parameters.items() if p.requires_grad)
    model.requires_grad_(False)
    for name in plan.trained:
        parameters[name].requires_grad_(True)
    for site, module in built:
        if isinstance(module, LoRALayer):
            module.lora_A.requires_grad_(True)
            module.lora_B.requires_grad_(True)
        site.put(module)
    record = Attachment(
        method=plan.method,
        adapted=tuple(s.name for s, m in built if isinstance(m, LoRALayer)),
        originals={s.name: s.module for s, m in built if not isinstance(m, LoRALayer)},
        notes=plan.notes,
        required_grad=required,
    )
    object.__setattr__(model, _RECORD, record)
    return record


def _refuse_second(model: nn.Module) -> None:
    """One model holds one adapter, and so does every part of it."""
    for name, module in model.named_modules():
        if attached(module) is not None or isinstance(module, LoRALayer):
            where = f"'{name}' in this model" if name else "This model"
            raise UserError(
                f"{where} carries an adapter already. Detach it first (rankwise.detach), or merge "
                "it into the base for good (rankwise.merge with keep=False)."
            )


def attached(model: nn.Module) -> Attachment | None:
    """The record that :func:`attach` left on this model, or None."""
    record = model.__dict__.get(_RECORD)
    return record if isinstance(record, Attachment) else None


def attachment(model: nn.Module) -> Attachment:
    """The record that :func:`attach` left on this model.

    Raises:
        UserError: nothing is attached.
    """
    record = attached(model)
    if record is None:
        raise UserError(
            f"This {type(model).__name__} carries no adapter. Attach one with "
            "rankwise.attach(model, rankwise.LoRA(...)), or load one with rankwise.load_adapter."
        )
    return record


def unmerged(model: nn.Module) -> Attachment:
    """The record of a model whose adapted layers are in their places.

    Raises:
        UserError: the model carries no adapter, or its adapter is merged.
    """
    record = attachment(model)
    if record.kept is not None or len(adapted_sites(model)) != len(record.adapted):
        raise UserError("The adapter of this model is merged; call rankwise.unmerge(model) first.")
    return record


def note_kept(model: nn.Module, kept: Mapping[str, tuple[nn.Module, LoRALayer]] | None) -> None:
    """Note on the record which layers were taken out, with what stands for them; None for none."""
    object.__setattr__(model, _RECORD, replace(attachment(model), kept=kept))


def detach(model: nn.Module) -> None:
    """Take the method off again: the very same base modules, keys and requires_grad as before.

    The update is gone with it; to keep it, take it first with rankwise.adapter_of(model) or
    rankwise.save_adapter. What full fine-tuning trained stays trained.

    Raises:
        UserError: the model carries no adapter, or its adapter is merged (unmerge first).
    """
    record = attachment(model)
    for site, layer in _unmerged_sites(model):
        site.put(layer.base_layer)
    _put_originals(model, record)
    forget(model)


def forget(model: nn.Module) -> None:
    """Drop the record and give every parameter that is still there its requires_grad back."""
    record = attachment(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in record.required_grad)
    object.__delattr__(model, _RECORD)


def adapted_sites(model: nn.Module) -> list[tuple[Site, LoRALayer]]:
    """Every adapted layer of a model and the places that hold it."""
    return [(s, s.module) for s in sites(model).values() if isinstance(s.module, LoRALayer)]


def _unmerged_sites(model: nn.Module) -> list[tuple[Site, LoRALayer]]:
    unmerged(model)
    return adapted_sites(model)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of a model by the name of the module they stand for."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}


def trained_copies(model: nn.Module) -> dict[str, nn.Module]:
    """The trained copies, such as the head, by the name of the module they stand for."""
    return {name: model.get_submodule(name) for name in attachment(model).originals}


@contextlib.contextmanager
def base(model: nn.Module) -> Generator[nn.Module]:
    """The model without its updates for the length of the block: the frozen layers themselves.

    A trained head stays in its place.

    Raises:
        UserError: the model carries no adapter, or its adapter is merged (unmerge first).
    """
    adapted = _unmerged_sites(model)
    for site, layer in adapted:
        site.put(layer.base_layer)
    try:
        yield model
    finally:
        for site, layer in adapted:
            site.put(layer)


def _put_originals(model: nn.Module, record: Attachment) -> None:
    """Hang the kept originals back, on the device where their copies are now."""
    table = sites(model)
    for name, original in record.originals.items():
        site = table[name]
        tensor = next(site.module.parameters(), None)
        site.put(original if tensor is None else original.to(tensor.device))
