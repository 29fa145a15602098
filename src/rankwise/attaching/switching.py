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
    required,
    unmerged,
    updates_of,
)
from rankwise.errors import UserError
from rankwise.targets import sites

__all__ = ["base", "hang_copies", "set_active", "set_trainable", "using"]


def set_active(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters act; their effects add up. Without names none acts.

    The cost does not depend on the number of layers: all updates of an adapter share one switch,
    and only trained copies, such as a head, are hung into the model.

    Raises:
        UserError: there is no adapter of a name, it is merged, or two of them have their own
            trained copy of one module, of which only one can be in its place.
    """
    book = required(model)
    if book.kept is not None:
        raise UserError("The adapter of this model is merged; call rankwise.unmerge(model) first.")
    wanted = [attachment(model, name) for name in names]
    _refuse_rivals(wanted)
    for record in book.attachments.values():
        record.switch.on = record.name in names
    hang_copies(model, book)


def _refuse_rivals(wanted: list[Attachment]) -> None:
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

    It comes on the device and in the mode of the one that it replaces; and where the model was cast
    as a whole meanwhile (model.double()), those aside are cast as well.
    """
    versions: dict[str, list[nn.Module]] = {}
    wanted: dict[str, nn.Module] = {}
    for record in book.attachments.values():
        for name, original in record.originals.items():
            versions.setdefault(name, []).extend((original, record.copies[name]))
            if record.active:
                wanted[name] = record.copies[name]
            else:
                wanted.setdefault(name, original)
    if not wanted:
        return
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
    before = [record.name for record in attachments(model).values() if record.active]
    set_active(model, *names)
    try:
        yield model
    finally:
        set_active(model, *before)


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
