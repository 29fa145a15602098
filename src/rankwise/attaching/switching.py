"""Which adapters act and which train: set_active, set_trainable, using, base."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable

import torch
from torch import nn

from rankwise.attaching.records import (
    Attachment,
    Book,
    attachment,
    attachments,
    refuse_routed,
    required,
    unmerged,
    updates_of,
)
from rankwise.errors import UserError
from rankwise.layers import ByRows, Routing
from rankwise.targets import sites

__all__ = [
    "activate",
    "base",
    "hang_copies",
    "refuse_rivals",
    "restored",
    "set_active",
    "set_trainable",
    "using",
]


def set_active(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters act; their effects add up. Without names none acts.

    The cost does not depend on the number of layers: all updates of an adapter share one switch,
    and only trained copies, such as a head, are hung into the model.

    Raises:
        UserError: there is no adapter of a name, it is merged, or two of them have their own
            trained copy of one module, of which only one can be in its place.
    """
    refuse_routed(required(model))
    activate(model, names)


def activate(model: nn.Module, names: Iterable[str], routing: Routing | None = None) -> None:
    """Let these adapters act, on all rows of a batch or where a routing says.

    Raises:
        UserError: as :func:`set_active` does.
    """
    book = required(model)
    if book.kept is not None:
        raise UserError("The adapter of this model is merged; call rankwise.unmerge(model) first.")
    wanted = {name: attachment(model, name) for name in names}
    if routing is None:
        refuse_rivals(wanted.values())
    for record in book.attachments.values():
        record.switch.on = record.name in wanted
        record.switch.routing = routing
    book.routing = routing
    hang_copies(model, book)


def refuse_rivals(wanted: Iterable[Attachment]) -> None:
    """Refuse two adapters with their own trained copy of one module.

    Raises:
        UserError: there are two.
    """
    held: dict[str, str] = {}
    for record in wanted:
        for module in record.copies:
            if module in held and held[module] != record.name:
                raise UserError(
                    f"'{held[module]}' and '{record.name}' both have their own trained copy of "
                    f"'{module}', and only one can be in its place: activate one of them."
                )
            held[module] = record.name


def hang_copies(model: nn.Module, book: Book) -> None:
    """In the place of each module with trained copies: the active adapter's, or the original.

    Where rows of a batch have different ones, it is a module that runs each on its rows. What is
    hung comes on the device and in the mode of what it replaces; and where the model was cast as a
    whole meanwhile (model.double()), those aside are cast as well.
    """
    versions: dict[str, list[nn.Module]] = {}
    for record in book.attachments.values():
        for name, original in record.originals.items():
            versions.setdefault(name, [original]).append(record.copies[name])
    if not versions:
        return
    wanted = {name: _hanging(book, name, own[0]) for name, own in versions.items()}
    table = sites(model)
    inside = tuple(f"{name}." for name in versions)
    rest = _dtype(p for n, p in model.named_parameters() if not n.startswith(inside))
    for name, module in wanted.items():
        now = table[name].module
        dtype = _dtype(now.parameters())
        own, others = book.hung.get(name, (dtype, rest))
        if own != dtype and others != rest:
            for version in versions[name]:
                version.to(dtype)
        if now is not module:
            tensor = next(now.parameters(), None)
            module.train(now.training)
            table[name].put(module if tensor is None else module.to(tensor.device))
        book.hung[name] = (_dtype(module.parameters()), rest)


def _hanging(book: Book, name: str, original: nn.Module) -> nn.Module:
    """The version of a module that is in force: one for all rows, or each row's own."""
    records = [r for r in book.attachments.values() if name in r.copies and r.active]
    copies = {r.name: r.copies[name] for r in records}
    if book.routing is None:
        return records[-1].copies[name] if records else original
    chosen = [
        next((copies[adapter] for adapter in way if adapter in copies), original)
        for way in book.routing.ways
    ]
    return ByRows(chosen) if len(set(chosen)) > 1 else chosen[0]


def _dtype(parameters: Iterable[nn.Parameter]) -> torch.dtype | None:
    return next((p.dtype for p in parameters if p.dtype.is_floating_point), None)


def set_trainable(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters train, whether they act or not. Without names none trains.

    Raises:
        UserError: there is no adapter of a name, it is merged, or a method trains the base itself.
    """
    chosen = {attachment(model, name).name for name in names}
    for record in unmerged(model).values():
        if not record.places and not record.copies:
            raise UserError(
                f"{type(record.method).__name__} trains the base itself; detach it to freeze it."
            )
    for record in attachments(model).values():
        for update in updates_of(model, record.name).values():
            for parameter in update.trained():
                parameter.requires_grad_(record.name in chosen)
        for module in record.copies.values():
            module.requires_grad_(record.name in chosen)


@contextlib.contextmanager
def using(model: nn.Module, *names: str) -> Generator[nn.Module]:
    """The model with exactly these adapters acting for the length of the block.

    Raises:
        UserError: as :func:`set_active` does.
    """
    with restored(model):
        activate(model, names)
        yield model


@contextlib.contextmanager
def restored(model: nn.Module) -> Generator[None]:
    """Afterwards the adapters act that act now, on the same rows, whatever happens in the block.

    Raises:
        UserError: the model carries no adapter; at the end, its adapters are gone or merged.
    """
    routing = required(model).routing
    before = [record.name for record in attachments(model).values() if record.active]
    try:
        yield
    finally:
        activate(model, before, routing)


@contextlib.contextmanager
def base(model: nn.Module) -> Generator[nn.Module]:
    """The model without its updates for the length of the block: the frozen layers' function.

    A trained head stays in its place (``using(model)`` takes that out as well).

    Raises:
        UserError: the model carries no adapter, or its adapter is merged (unmerge first).
    """
    switches = [record.switch for record in unmerged(model).values()]
    before = [switch.on for switch in switches]
    for switch in switches:
        switch.on = False
    try:
        yield model
    finally:
        for switch, on in zip(switches, before, strict=True):
            switch.on = on
