"""What every method would train on a model, in parameters and bytes, without a weight."""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from rankwise.attaching import Method, attach, low_rank_updates, trained_copies, updates_of
from rankwise.errors import UserError
from rankwise.layers import LowRank, Update
from rankwise.lowrank import count
from rankwise.methods.full import Full
from rankwise.methods.lora import LoRA
from rankwise.train.config import FitConfig
from rankwise.train.manifest import by_formula, method_record
from rankwise.train.model import Base
from rankwise.train.setup import make_method
from rankwise.train.skeleton import make_skeleton

__all__ = ["METHODS", "MethodCount", "ModelCount", "ShapeCount", "count_model", "file_bytes"]

METHODS: tuple[str, ...] = typing.get_args(FitConfig.model_fields["method"].annotation)
"""Every method that a run can be asked for."""
_FLOAT32, _FLOAT64 = 4, 8


@dataclass(frozen=True)
class ShapeCount:
    """The adapted layers of one shape and rank.

    ``update`` is r · (in + out) of one of them, ``dense`` its in · out. docs/math.md (3).
    """

    layers: int
    out_features: int
    in_features: int
    r: int
    update: int
    dense: int


@dataclass(frozen=True)
class MethodCount:
    """What one method trains on a model.

    Attributes:
        method: its word in a config: "lora", "head", "full", "bitfit", ...
        name: its name for a reader.
        formula: parameters of the low-rank updates that train, by Σ r · (in + out), docs/math.md
            (3), with DoRA's magnitudes and without a frozen A; None where the method has none.
        adapter: parameters that are added and train, by counting.
        head: parameters of the modules that train whole, such as the head.
        trained: all that train; for full fine-tuning the whole model.
        share: trained as a fraction of the base.
        file_bytes: bytes of the tensors in the adapter's file; its header adds some hundred bytes
            for each.
        gradient_bytes: of the gradients, float32.
        optimizer_bytes: of AdamW's two moments, float32.
    """

    method: str
    name: str
    formula: int | None
    adapter: int
    head: int
    trained: int
    share: float
    file_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class ModelCount:
    """Every method on one model.

    Attributes:
        model: where the config came from.
        task: what the model is for; it decides its head.
        base: parameters of the model with its head, and nothing added.
        shapes: the layers that LoRA adapts, by shape and rank, the most numerous first.
        methods: the methods, in the order of METHODS; bottleneck adapters by their placement.
        notes: what a user should know, such as why a method is not among them.
    """

    model: str
    task: str
    base: int
    shapes: tuple[ShapeCount, ...]
    methods: tuple[MethodCount, ...]
    notes: tuple[str, ...]


def count_model(config: FitConfig, labels: int = 2, methods: Sequence[str] = METHODS) -> ModelCount:
    """Attach each method to the model on the meta device, and count what trains.

    Args:
        config: model (a folder, a config file or a name on a hub), task and method options. Of
            several methods the targets are LoRA's, and bottlenecks stand by their placement.
        labels: classes of a classification head.
        methods: which to count. One that this model cannot have is told in the notes, unless it is
            LoRA or the only one.

    Raises:
        UserError: the model or the method's targets cannot be had; see ``attach``.
        ArtifactError: the config is damaged.
        EnvironmentFault: transformers is not installed, or the hub cannot be reached.
    """
    found: list[MethodCount] = []
    shapes: tuple[ShapeCount, ...] = ()
    notes: dict[str, None] = {}
    task, base = "", 0
    for options in _wanted(config, methods):
        model, task = make_skeleton(config.model, config.task, labels, config.revision)
        base = sum(p.numel() for p in model.parameters())
        bare = Base(model, None, config.model, "", (), None)  # type: ignore[arg-type]
        try:
            done = attach(model, make_method(options, bare))
        except UserError as error:
            if options.method == "lora" or len(methods) == 1:
                raise
            notes[f"{method_record(options)[0]}: {error}"] = None
            continue
        if isinstance(done.method, LoRA):
            shapes = _shapes(low_rank_updates(model).values())
            notes |= dict.fromkeys(done.notes)
        found.append(_count(model, options, base, done.method))
    return ModelCount(config.model, task, base, shapes, tuple(found), tuple(notes))


def _wanted(config: FitConfig, methods: Sequence[str]) -> Iterator[FitConfig]:
    """The options of each method; bottlenecks beside others in both ways, where none is named."""
    for word in methods:
        options = config.model_copy(update={"method": word})
        if word != "bottleneck" or len(methods) == 1:
            yield options
            continue
        # the targets beside LoRA's are LoRA's
        everywhere = {"target_modules": None, "exclude_modules": [], "layers": None}
        named = options.adapter_placement
        for placement in ("houlsby", "pfeiffer") if named is None else (named,):
            yield options.model_copy(update={**everywhere, "adapter_placement": placement})


def _count(model: nn.Module, options: FitConfig, base: int, method: Method) -> MethodCount:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    updates = list(updates_of(model).values())
    copies = list(trained_copies(model).values())
    low = [update for update in updates if isinstance(update, LowRank)]
    return MethodCount(
        method=options.method,
        name=method_record(options)[0],
        formula=sum(map(by_formula, low)) if low else None,
        adapter=sum(p.numel() for update in updates for p in update.trained()),
        head=sum(p.numel() for copy in copies for p in copy.parameters()),
        trained=trained,
        share=trained / base,
        file_bytes=file_bytes(model, method),
        gradient_bytes=_FLOAT32 * trained,
        optimizer_bytes=2 * _FLOAT32 * trained,
    )


def file_bytes(model: nn.Module, method: Method) -> int:
    """Bytes of the tensors in the file that ``save_adapter`` writes of this model.

    Tensors may be on the meta device. The file's header adds some hundred bytes for each tensor.
    """
    if isinstance(method, Full):
        return _stored([model])
    peft = isinstance(method, LoRA)
    copies = _stored(trained_copies(model).values())
    return copies + sum(_update_bytes(update, peft) for update in updates_of(model).values())


def _stored(modules: Iterable[nn.Module]) -> int:
    """Bytes of what a checkpoint of the modules holds, shared tensors once, floats as float32."""
    tensors = {id(t): t for m in modules for t in m.state_dict(keep_vars=True).values()}
    return sum(
        t.numel() * (_FLOAT32 if t.is_floating_point() else t.element_size())
        for t in tensors.values()
    )


def _update_bytes(update: Update, peft: bool) -> int:
    """Bytes of what a file holds of an update.

    A start (A0, B0) is in it as a pair of rank 2r, a frozen A as well as one that trains. Biases
    and rows of embeddings are in PEFT's file in float64, so that what was added comes back exactly.
    """
    if not isinstance(update, LowRank):
        width = _FLOAT64 if peft else _FLOAT32
        return width * sum(p.numel() for p in update.trained())
    magnitudes = 0 if update.magnitude is None else update.magnitude.numel()
    return _FLOAT32 * (update.factors().pair().count() + magnitudes)


def _shapes(updates: Iterable[LowRank]) -> tuple[ShapeCount, ...]:
    """The adapted weights by shape and rank; those of a bank of experts one by one."""
    found: Counter[tuple[int, int, int]] = Counter()
    for update in updates:
        layout = update.layout
        found[layout.out_features, layout.in_features, update.spec.r] += layout.experts or 1
    return tuple(
        ShapeCount(number, out, into, r, count(out, into, r), out * into)
        for (out, into, r), number in found.most_common()
    )
