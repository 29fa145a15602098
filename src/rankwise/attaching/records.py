"""What is noted on a model: its adapters by name, their updates, and what it was before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from rankwise.attaching.plans import Method
from rankwise.errors import UserError, nearest
from rankwise.layers import LoRALayer, LowRank, Routing, Switch, Update, reorder
from rankwise.targets import Site, sites

__all__ = [
    "Attachment",
    "Book",
    "adapted_sites",
    "attached",
    "attachment",
    "attachments",
    "book_of",
    "forget",
    "kept_layers",
    "lora_layers",
    "low_rank_updates",
    "note_book",
    "note_kept",
    "note_method",
    "refuse_routed",
    "required",
    "trained_copies",
    "unmerged",
    "unrouted",
    "updates_of",
]

_BOOK = "_rankwise_book"


@dataclass(frozen=True)
class Attachment:
    """The record of one adapter on a model, as :func:`attach` leaves it.

    Attributes:
        name: of the adapter.
        method: the value that was attached.
        adapted: names of what carries a low-rank update: modules, parts of them, parameters.
        notes: what the user should be told.
        switch: whether it acts.
        batchwide: names of what it changes for whole batches alone, as where a module reads its
            weights itself, so that the rows of a batch cannot have different adapters there.
        places: the module and the key in its ``updates`` of each update, by the update's name.
        originals: the base's own modules that a trained copy stands for, by name.
        copies: the trained copies, by name.
    """

    name: str
    method: Method
    adapted: tuple[str, ...]
    notes: tuple[str, ...]
    switch: Switch
    batchwide: tuple[str, ...]
    places: Mapping[str, tuple[str, str]] = field(repr=False)
    originals: Mapping[str, nn.Module] = field(repr=False)
    copies: Mapping[str, nn.Module] = field(repr=False)

    @property
    def active(self) -> bool:
        """Whether the adapter acts."""
        return self.switch.on


@dataclass
class Book:
    """What is noted on a model: its adapters by name, and what it was before the first of them.

    ``hung`` has the dtype in which each module with trained copies was hung into the model, and
    that of the model around it. ``routing`` says which rows of a batch go through which adapters,
    where they do not all go through the active ones. ``ordered`` are quantised layers that would
    reorder their numbers by themselves.
    """

    required_grad: frozenset[str]
    ordered: tuple[nn.Module, ...] = ()
    attachments: dict[str, Attachment] = field(default_factory=dict[str, Attachment])
    kept: Mapping[str, tuple[nn.Module, LoRALayer]] | None = None
    routing: Routing | None = None
    hung: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = field(
        default_factory=dict[str, tuple[torch.dtype | None, torch.dtype | None]]
    )


def attached(model: nn.Module) -> dict[str, Attachment]:
    """The records of the adapters on this model by name; empty when there are none."""
    book = book_of(model)
    return {} if book is None else dict(book.attachments)


def attachments(model: nn.Module) -> dict[str, Attachment]:
    """The records of the adapters on this model, by name, in the order they were attached.

    Raises:
        UserError: nothing is attached.
    """
    return dict(required(model).attachments)


def attachment(model: nn.Module, name: str | None = None) -> Attachment:
    """The record of one adapter on this model; without a name, of the only one.

    Raises:
        UserError: nothing is attached, nothing of this name, or several and no name is given.
    """
    records = required(model).attachments
    if name is not None:
        if name not in records:
            raise UserError(
                f"This model carries no adapter named '{name}'; it carries "
                f"{', '.join(records)}.{nearest(name, records)}"
            )
        return records[name]
    if len(records) > 1:
        raise UserError(f"This model carries several adapters; name one of {', '.join(records)}.")
    return next(iter(records.values()))


def note_book(model: nn.Module, book: Book) -> None:
    """Leave the notes on a model."""
    object.__setattr__(model, _BOOK, book)


def book_of(model: nn.Module) -> Book | None:
    """The notes on a model, or None."""
    book = model.__dict__.get(_BOOK)
    return book if isinstance(book, Book) else None


def required(model: nn.Module) -> Book:
    """The notes on a model.

    Raises:
        UserError: nothing is attached.
    """
    book = book_of(model)
    if book is None:
        raise UserError(
            f"This {type(model).__name__} carries no adapter. Attach one with "
            "rankwise.attach(model, rankwise.LoRA(...)), or load one with rankwise.load_adapter."
        )
    return book


def unmerged(model: nn.Module) -> dict[str, Attachment]:
    """The records of a model whose adapted layers are in their places.

    Raises:
        UserError: the model carries no adapter, or its adapter is merged.
    """
    book = required(model)
    layers = lora_layers(model)
    gone = {site for a in book.attachments.values() for site, _ in a.places.values()} - set(layers)
    if book.kept is not None or gone:
        raise UserError("The adapter of this model is merged; call rankwise.unmerge(model) first.")
    return dict(book.attachments)


def unrouted(model: nn.Module) -> dict[str, Attachment]:
    """The same, of a model whose adapters are not bound to rows of a batch just now.

    Raises:
        UserError: as :func:`unmerged` does, or this is a block of :func:`rankwise.using_rows`.
    """
    refuse_routed(required(model))
    return unmerged(model)


def refuse_routed(book: Book) -> None:
    """Refuse what is for all rows of a batch while they go through different adapters.

    Raises:
        UserError: they do.
    """
    if book.routing is not None:
        raise UserError(
            "The rows of a batch go through different adapters here, and this is for all rows: do "
            "it outside of the block of rankwise.using_rows."
        )


def kept_layers(model: nn.Module) -> Mapping[str, tuple[nn.Module, LoRALayer]] | None:
    """While the updates are merged: the plain module that stands in the place of each adapted
    layer and that layer itself, by name; None while nothing is merged.

    Raises:
        UserError: nothing is attached.
    """
    return required(model).kept


def note_kept(model: nn.Module, kept: Mapping[str, tuple[nn.Module, LoRALayer]] | None) -> None:
    """Note which layers were taken out, with what stands for them; None for none."""
    required(model).kept = kept


def note_method(model: nn.Module, name: str, method: Method, adapted: tuple[str, ...]) -> None:
    """Note that an adapter's places hold another method's numbers now."""
    book = required(model)
    book.attachments[name] = replace(book.attachments[name], method=method, adapted=adapted)


def forget(model: nn.Module) -> None:
    """Drop the records and give every parameter that is still there its requires_grad back."""
    book = required(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in book.required_grad)
    reorder(book.ordered)
    object.__delattr__(model, _BOOK)


def adapted_sites(model: nn.Module) -> list[tuple[Site, LoRALayer]]:
    """Every adapted layer of a model and the places that hold it."""
    return [(s, s.module) for s in sites(model).values() if isinstance(s.module, LoRALayer)]


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of a model by the name of the module they stand for."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}


def updates_of(model: nn.Module, name: str | None = None) -> dict[str, Update]:
    """The updates of one adapter by the name of what they change; without a name, of the only one.

    Raises:
        UserError: as :func:`attachment` does.
    """
    layers = lora_layers(model)
    places = attachment(model, name).places
    found = {n: layers[site].updates[key] for n, (site, key) in places.items() if site in layers}
    return {n: update for n, update in found.items() if isinstance(update, Update)}


def low_rank_updates(model: nn.Module, name: str | None = None) -> dict[str, LowRank]:
    """The low-rank updates of one adapter by the name of what they adapt.

    Raises:
        UserError: as :func:`attachment` does.
    """
    return {n: u for n, u in updates_of(model, name).items() if isinstance(u, LowRank)}


def trained_copies(model: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """The trained copies of one adapter, such as the head, by the name of the module they replace.

    Raises:
        UserError: as :func:`attachment` does.
    """
    return dict(attachment(model, name).copies)
