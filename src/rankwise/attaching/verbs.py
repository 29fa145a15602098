"""attach and detach on any nn.Module: what is put in, what trains, and the way back."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator, Mapping

from torch import nn

from rankwise.attaching.collector import uncollected
from rankwise.attaching.plans import Addition, Method, Plan
from rankwise.attaching.records import (
    Attachment,
    Book,
    adapted_sites,
    attachment,
    book_of,
    forget,
    note_book,
    refuse_routed,
    required,
    unrouted,
)
from rankwise.attaching.switching import hang_copies
from rankwise.errors import UserError
from rankwise.layers import (
    LoRALayer,
    LowRank,
    Switch,
    Update,
    adapt,
    drop_updates,
    keep_order,
    released,
    reorder,
)
from rankwise.targets import Site

__all__ = ["DEFAULT", "attach", "detach", "rehearse"]

DEFAULT = "default"


@uncollected
def attach(model: nn.Module, method: Method, *, name: str = DEFAULT) -> Attachment:
    """Put a method on a model in place: freeze the base, add the layers, free what trains.

    The step-0 function is the base's, bit for bit (LoftQ apart, whose purpose is another step 0,
    and prefixes, which take their share of attention at once), and no base weight is written, then
    or later (full fine-tuning apart, which trains the base itself). :func:`detach` is the inverse.

    Several adapters may be attached under different names; the effects of those that are active
    add up (:func:`set_active`), and which of them train is a matter of its own
    (:func:`set_trainable`): a new one is active and trains, and the others stay as they were. Where
    a new one brings its own copy of a module, such as the head, that an active one has a copy of as
    well, it is attached switched off, and a note says so.

    bitsandbytes' 4-bit layers keep their numbers in the order of storage while adapters are on the
    model: on some CPUs they would reorder and round them when the model is evaluated, and give no
    gradients from then on.

    Returns the record of what was done; its ``notes`` say what a user should know, such as that
    the head trains.

    Raises:
        UserError: the model carries an adapter of this name already, or a part of it or a merged
            one, or the plan cannot be carried out; the model is then as it was.
    """
    book = book_of(model)
    _refuse(model, name, book)
    with _keeping_order(model, book) as ordered:
        plan = method.plan(model)
        if book is not None and plan.trained:
            raise UserError(
                f"{type(plan.method).__name__} trains the base itself, and this model carries "
                "adapters. Detach them first (rankwise.detach)."
            )
        _refuse_overlap(plan, book)
        switch = Switch(name)
        layers, made = _made(plan, switch)
        copies = {
            place.site.name: place.build(_original(book, place.site)).requires_grad_(True)
            for place in plan.placements
        }
    if book is None:
        book = Book(_trainable(model), ordered)
        model.requires_grad_(False)
        note_book(model, book)
    batchwide = tuple(_batchwide(plan, layers))
    places = _put_in(plan, layers, made, name)
    for parameter in plan.trained:
        model.get_parameter(parameter).requires_grad_(True)
    notes = [*plan.notes, *_conflict(book, copies, switch)]
    record = Attachment(
        name=name,
        method=plan.method,
        adapted=tuple(n for n, update in made.items() if isinstance(update, LowRank)),
        notes=tuple(notes),
        switch=switch,
        batchwide=batchwide,
        places=places,
        originals={p.site.name: _original(book, p.site) for p in plan.placements},
        copies=copies,
    )
    book.attachments[name] = record
    hang_copies(model, book)
    return record


@contextlib.contextmanager
def _keeping_order(model: nn.Module, book: Book | None) -> Generator[tuple[nn.Module, ...]]:
    """The 4-bit layers of a model without adapters that reorder their numbers, and now do not.

    A plan may run the model in evaluation mode, as starts that look at data do. Where it fails they
    are let go.
    """
    ordered = keep_order(model) if book is None else ()
    try:
        yield ordered
    except BaseException:
        reorder(ordered)
        raise


def _refuse_overlap(plan: Plan, book: Book | None) -> None:
    """A module that one adapter trains whole cannot be changed in part by another."""
    whole = [place.site.name for place in plan.placements]
    parts = [addition.site.name for addition in plan.additions]
    for record in book.attachments.values() if book is not None else ():
        theirs = [site for site, _ in record.places.values()]
        pairs = [(w, t) for w in whole for t in theirs]
        pairs += [(c, p) for c in record.copies for p in parts]
        pairs += [(w, c) for w in whole for c in record.copies if w != c]
        for one, other in pairs:
            if one == other or one.startswith(other + ".") or other.startswith(one + "."):
                raise UserError(
                    f"'{one}' and '{other}': one adapter trains the module as a whole, and '"
                    f"{record.name}' and the new one would both change it. Detach '{record.name}' "
                    "first, or leave the module out of one of them (modules_to_save, head, "
                    "exclude_modules)."
                )


def _depth(site: Site) -> int:
    return min(place.count(".") for place in site.places)


def rehearse(plan: Plan) -> dict[str, Update]:
    """The updates that a plan would make, by name, without touching the model."""
    return _made(plan, Switch(DEFAULT))[1]


def _made(plan: Plan, switch: Switch) -> tuple[dict[str, LoRALayer], dict[str, Update]]:
    """The layers and the updates of a plan, made without touching the model."""
    wanted: dict[str, dict[str, None]] = {}
    for addition in plan.additions:
        wanted.setdefault(addition.site.name, {}).update(dict.fromkeys(_read(addition)))
    layers: dict[str, LoRALayer] = {}
    made: dict[str, Update] = {}
    for addition in plan.additions:
        site = addition.site
        if site.name not in layers:
            there = site.module  # which is widened only when nothing can fail any more
            names = tuple(wanted[site.name])
            layers[site.name] = there if isinstance(there, LoRALayer) else adapt(there, names)
        layer = layers[site.name]
        made[addition.name] = addition.make(layer, switch, made)
    return layers, made


def _put_in(
    plan: Plan, layers: Mapping[str, LoRALayer], made: Mapping[str, Update], adapter: str
) -> dict[str, tuple[str, str]]:
    """Hang the layers into the model and the updates into the layers; where each update is."""
    for layer in layers.values():
        layer.base_layer.requires_grad_(False)
    outer_first = sorted({a.site.name: a.site for a in plan.additions}.values(), key=_depth)
    for site in outer_first:  # an inner one hangs in the twin that stands for its owner by now
        if site.module is not layers[site.name]:
            site.put(layers[site.name])
    places: dict[str, tuple[str, str]] = {}
    for addition in plan.additions:
        layer = adapt(layers[addition.site.name], _read(addition))
        key = f"{adapter}/{addition.label}" if addition.label else adapter
        update = made[addition.name]
        layer.updates[key] = update
        for parameter in update.trained():
            parameter.requires_grad_(True)
        places[addition.name] = (addition.site.name, key)
    return places


def _batchwide(plan: Plan, layers: Mapping[str, LoRALayer]) -> Iterator[str]:
    """Names of what acts on whole batches alone.

    That is where a module reads its weights itself, and where torch's own layers put the positions
    of a sequence before the rows of the batch.
    """
    for addition in plan.additions:
        owners = [parent for parent, _ in addition.site.owners()]
        routed = layers[addition.site.name].routes(addition.parameter)
        if not routed or any(map(_bars, owners)):
            yield addition.name
    for place in plan.placements:
        if any(_bars(parent) for parent, _ in place.site.owners()):
            yield place.site.name


def _bars(owner: nn.Module) -> bool:
    if isinstance(owner, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return not owner.self_attn.batch_first
    return isinstance(owner, nn.MultiheadAttention)


def _read(addition: Addition) -> tuple[str, ...]:
    """The parameters that a module without a layer around it must read with the update."""
    return () if addition.parameter is None else (addition.parameter,)


def _trainable(model: nn.Module) -> frozenset[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(n for n, p in parameters if p.requires_grad)


def _refuse(model: nn.Module, name: str, book: Book | None) -> None:
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(
            f"An adapter's name has letters, digits, '_' and '-' and nothing else, got {name!r}."
        )
    if book is None:
        for part, module in model.named_modules():
            if book_of(module) is not None or isinstance(module, LoRALayer):
                where = f"'{part}' in this model" if part else "This model"
                raise UserError(
                    f"{where} carries an adapter already. Detach it first "
                    "(rankwise.detach), or merge it into the base for good (rankwise.merge with "
                    "keep=False)."
                )
        return
    refuse_routed(book)
    if book.kept is not None:
        raise UserError("The adapter of this model is merged; call rankwise.unmerge(model) first.")
    if name in book.attachments:
        raise UserError(
            f"This model carries an adapter already, and it is named '{name}'. Detach it first "
            "(rankwise.detach), merge it into the base for good (rankwise.merge with keep=False), "
            "or attach the second under another name: rankwise.attach(model, method, name='...')."
        )
    inplace = [a.name for a in book.attachments.values() if not a.places and not a.copies]
    if inplace:
        raise UserError("This model trains as a whole; detach that first (rankwise.detach).")


def _original(book: Book | None, site: Site) -> nn.Module:
    """The base's own module at a site, also where an adapter's trained copy hangs."""
    for record in book.attachments.values() if book is not None else ():
        if site.name in record.originals:
            return record.originals[site.name]
    return site.base


def _conflict(book: Book, copies: Mapping[str, nn.Module], switch: Switch) -> Iterator[str]:
    for record in book.attachments.values():
        both = [name for name in copies if name in record.copies]
        if both and record.active:
            switch.on = False
            yield (
                f"'{switch.adapter}' is attached but switched off: '{record.name}' is active, and "
                f"both have their own trained copy of '{both[0]}'. "
                f"rankwise.set_active(model, '{switch.adapter}') switches over."
            )


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off again, or all of them: with the last one gone the model has the very
    same base modules, keys and requires_grad as before.

    The update is gone with it; to keep it, take it first with rankwise.adapter_of(model) or
    rankwise.save_adapter. What full fine-tuning trained stays trained.

    Raises:
        UserError: the model carries no adapter, none of this name, or its adapter is merged
            (unmerge first).
    """
    unrouted(model)
    book = required(model)
    leaving = [attachment(model, name)] if name is not None else list(book.attachments.values())
    for record in leaving:
        record.switch.on = False
        hang_copies(model, book)
        for site, layer in adapted_sites(model):
            if drop_updates(layer, record.name):
                site.put(released(layer))
        del book.attachments[record.name]
    if not book.attachments:
        forget(model)
