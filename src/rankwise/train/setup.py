"""What a run is made of: the examples, the method and the lengths that its config asks for."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rankwise.attaching import Method, attach
from rankwise.data.encode import encode, padding_id
from rankwise.data.examples import ColumnNames, Examples, load_examples
from rankwise.data.splits import leakage, require_same_form, split
from rankwise.errors import UserError
from rankwise.inits import (
    EVA,
    Fitted,
    Gaussian,
    Init,
    Kaiming,
    LoRAGA,
    OLoRA,
    Orthogonal,
    PiSSA,
)
from rankwise.methods.bitfit import BitFit
from rankwise.methods.bottleneck import After, Bottleneck, Houlsby, Pfeiffer
from rankwise.methods.full import Full
from rankwise.methods.head import HeadChoice, HeadOnly, head_modules
from rankwise.methods.lora import LoRA
from rankwise.methods.prefix import PrefixTuning
from rankwise.train.config import FitConfig
from rankwise.train.evaluate import Rows, batch_loss
from rankwise.train.frozen import Kernels, choose_kernels, recompute_frozen
from rankwise.train.model import Base, checkpoint_blocks, fresh_modules
from rankwise.train.precision import Choice, cast_frozen, choose_dtype
from rankwise.train.reporter import Reporter

__all__ = [
    "Data",
    "Prepared",
    "adapt",
    "column_names",
    "encoded_rows",
    "equip",
    "in_order",
    "listed",
    "load_data",
    "longest_input",
    "make_method",
    "number_format",
    "prepare",
]


START_BATCHES = 8  # that a start sees which looks at the running model


@dataclass(frozen=True)
class Data:
    """Training and evaluation examples of one form."""

    train: Examples
    held: Examples
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What a run trains.

    Attributes:
        model: with its method attached, on its device in its number format.
        choice: the number format.
        kernels: those that it is computed by.
    """

    model: nn.Module
    choice: Choice
    kernels: Kernels


def column_names(config: FitConfig) -> ColumnNames:
    """The columns that a config names."""
    return ColumnNames(
        text=config.text_column,
        pair=config.pair_column,
        label=config.label_column,
        prompt=config.prompt_column,
        completion=config.completion_column,
        messages=config.messages_column,
    )


def longest_input(config: FitConfig, base: Base) -> int:
    """The longest input in tokens: what the config asks for, or less where the model takes less."""
    return min(config.max_length, base.longest or config.max_length)


def load_data(config: FitConfig) -> Data:
    """Read and check the examples a config names; hold some out when there is no --eval."""
    columns = column_names(config)
    train = load_examples(config.data, config.task, columns, limit=config.limit)
    notes = list(train.notes)
    if config.eval is None:
        train, held = split(train, config.eval_fraction, config.seed)
        notes.append(
            f"No --eval was given: {len(held):,} of the {len(train) + len(held):,} rows are held "
            "out for evaluation."
        )
    else:
        held = load_examples(
            config.eval,
            train.task,
            columns,
            label_names=train.label_names or None,
            fallback=True,
        )
        notes.extend(held.notes)
        require_same_form(train, held)
        shared = leakage(train, held)
        if shared.count:
            notes.append(shared.note)
    return Data(train, held, tuple(notes))


def in_order(data: Data, names: Sequence[str]) -> Data:
    """The data with its classes numbered in the order of ``names``, capitals aside.

    So a head that was trained for these classes means the same ones. Data of other classes, or
    without classes, come back as they are.
    """
    own = data.train.label_names
    place = {name.casefold(): i for i, name in enumerate(names)}
    same = len(place) == len(names) and sorted(place) == sorted(map(str.casefold, own))
    if not own or not same:
        return data
    order = sorted(own, key=lambda name: place[name.casefold()])
    number = {old: order.index(name) for old, name in enumerate(own)}

    def renumbered(examples: Examples) -> Examples:
        labels = [number[int(label)] for label in examples.labels or ()]
        return replace(examples, labels=labels, label_names=tuple(order))

    return Data(renumbered(data.train), renumbered(data.held), data.notes)


def make_method(config: FitConfig, base: Base, rows: Rows | None = None) -> Method:
    """The method a config names; modules that the checkpoint left random train with it.

    ``rows`` are what a start that looks at the running model sees; without them (as when a plan is
    made without weights) the default start stands for it, which has the same shapes.

    Raises:
        UserError: --head freeze, and the head is random or means other classes.
    """
    if config.method == "full":
        return Full()
    found = head_modules(base.model)
    fresh = fresh_modules(base.fresh, found)
    whole = tuple(dict.fromkeys([*config.modules_to_save, *fresh]))
    if config.method == "head":
        return HeadOnly(whole)
    missing = [n for n in base.fresh if n.startswith(tuple(f"{h}." for h in found))]
    if config.head == "freeze" and missing:
        raise UserError(
            f"--head freeze would keep the output layer at random values, as {listed(missing)} "
            f"are not in the checkpoint '{base.source}', and they would be saved nowhere. Use "
            "--head train."
        )
    if config.head == "freeze" and base.foreign:
        raise UserError(
            f"--head freeze would keep an output layer that means other classes: in the checkpoint "
            f"'{base.source}' it was trained for {listed(base.foreign)}, which are not the labels "
            "of the data. Use --head train."
        )
    head = "train" if missing else None if config.head == "auto" else config.head
    if config.method != "lora":
        return _added(config, head, whole)
    return LoRA(
        r=config.r,
        alpha=config.alpha,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers=config.layers,
        rank_stabilized=config.rank_stabilized,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        dropout=config.dropout,
        init=_start(config, rows),
        dora=config.dora,
        freeze_A=config.freeze_a,
        bias=config.bias,
        tied=config.tied,
        head=head,
        modules_to_save=whole,
    )


def _added(config: FitConfig, head: HeadChoice, whole: tuple[str, ...]) -> Method:
    """BitFit, a bottleneck or a prefix, as a config says."""
    if config.method == "bitfit":
        return BitFit(head, whole)
    if config.method == "prefix":
        return PrefixTuning(config.prefix_length, head=head, modules_to_save=whole)
    named = config.target_modules
    if named is not None and config.adapter_placement is not None:
        raise UserError(
            "--adapter-placement and --target-modules both say behind which layers bottlenecks "
            "stand. Give one of them."
        )
    if named is None and (config.exclude_modules or config.layers is not None):
        raise UserError(
            "--exclude-modules and --layers choose among --target-modules, which is not given."
        )
    if named is not None:
        place = After(named, config.exclude_modules, config.layers)
    else:
        place = Pfeiffer() if config.adapter_placement == "pfeiffer" else Houlsby()
    return Bottleneck(config.adapter_size, place, head=head, modules_to_save=whole)


def _start(config: FitConfig, rows: Rows | None) -> Init | Fitted:
    """The start a config names."""
    plain: dict[str, Init] = {
        "kaiming": Kaiming(),
        "gaussian": Gaussian(),
        "orthogonal": Orthogonal(),
        "pissa": PiSSA(),
        "olora": OLoRA(),
    }
    if config.init in plain:
        return plain[config.init]
    if rows is None:
        return Kaiming()
    order = random.Random(config.seed).sample(range(len(rows.encoded)), len(rows.encoded))
    size = config.batch_size
    parts = [sorted(order[i : i + size]) for i in range(0, len(order), size)][:START_BATCHES]
    batches = [rows.batch(part) for part in parts]
    if config.init == "eva":
        return EVA(batches, forward=_forward)
    return LoRAGA(batches, loss=lambda model, batch: batch_loss(model, batch, rows.task))


def _forward(model: nn.Module, batch: Any) -> object:
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"})


def encoded_rows(
    config: FitConfig, data: Data, base: Base, device: torch.device, watcher: Reporter
) -> tuple[Rows, Rows]:
    """The training and the evaluation rows as tokens.

    Raises:
        UserError: the examples do not fit the model.
    """
    length = longest_input(config, base)
    pad = padding_id(base.tokenizer)
    rows: list[Rows] = []
    for name, examples in (("training", data.train), ("evaluation", data.held)):
        encoded = encode(examples, base.tokenizer, length)
        for note in encoded.notes:
            watcher.note(f"{name}: {note}")
        rows.append(Rows(encoded, examples.task, pad, device))
    return rows[0], rows[1]


def prepare(
    config: FitConfig,
    base: Base,
    rows: Rows,
    before: Mapping[str, Any] | None,
    watcher: Reporter,
) -> Prepared:
    """The model with its method, on its device in its number format.

    Args:
        base: whose model is changed in place.
        rows: the training rows, on the device.
        before: the manifest of the run that goes on, whose number format is kept.
        watcher: told what is done.

    Raises:
        UserError: the method or the number format do not fit the model.
    """
    model: Any = base.model
    device = rows.device
    if config.init in ("eva", "lora-ga"):
        seen = min(START_BATCHES * config.batch_size, len(rows.encoded))
        watcher.note(f"{config.init}: looking at {seen:,} of the training rows.")
        model.to(device)
    choice = equip(config, base, device, before, watcher, rows)
    model.to(device)
    kernels = Kernels()
    if config.pack == "auto":
        kernels = choose_kernels(model, rows.encoded.lengths, config.batch_size, before, watcher)
    return Prepared(model, choice, kernels)


def equip(
    config: FitConfig,
    base: Base,
    device: torch.device,
    before: Mapping[str, Any] | None,
    watcher: Reporter,
    rows: Rows | None = None,
) -> Choice:
    """Attach the method to the base's model and put it into the number format for ``device``.

    ``rows`` are the training rows for a start that looks at the running model; see
    :func:`make_method`. The model stays where it is.

    Raises:
        UserError: the method or the number format does not fit the model.
    """
    model = base.model
    adapt(config, base, watcher, rows)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    choice = number_format(config, model, device, before)
    if choice.dtype != torch.float32:
        cast_frozen(model, choice.dtype)
    if config.recompute:  # in the format that it trains in, which decides what is kept
        recompute_frozen(model, watcher)
    watcher.note(f"Base in {choice.name} on {device.type} ({choice.reason}).")
    return choice


def adapt(config: FitConfig, base: Base, watcher: Reporter, rows: Rows | None = None) -> None:
    """Attach the method to the base's model, and tell what there is to know of it.

    Raises:
        UserError: the method does not fit the model.
    """
    for note in attach(base.model, make_method(config, base, rows)).notes:
        watcher.note(note)


def number_format(
    config: FitConfig, model: nn.Module, device: torch.device, before: Mapping[str, Any] | None
) -> Choice:
    """The number format of the base: that of the run that goes on, or the one that is chosen.

    Raises:
        UserError: the base itself trains, and is asked to be in another than float32.
    """
    if before is not None:
        hardware = before["hardware"]
        return Choice(getattr(torch, hardware["dtype"]), hardware["dtype_reason"])
    frozen = config.method != "full"
    width = int(getattr(model.config, "hidden_size", 512))
    choice = choose_dtype(config.dtype, device, width, frozen)
    if choice.dtype != torch.float32 and not frozen:
        raise UserError(
            "--dtype bfloat16 is for a frozen base; full fine-tuning trains the base itself "
            "and keeps it in float32. Use --dtype float32 or auto."
        )
    return choice


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
