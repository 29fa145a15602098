"""What a method would adapt and train on a model, told from its config alone, without weights."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.attaching import attach, low_rank_updates, updates_of
from rankwise.layers import FreePrefix, LowRank, Network, Offset, Update
from rankwise.lowrank import count
from rankwise.methods.head import head_modules
from rankwise.methods.lora import LoRA
from rankwise.targets import targets_of
from rankwise.train.config import FitConfig
from rankwise.train.counting import file_bytes
from rankwise.train.manifest import counts
from rankwise.train.model import Base
from rankwise.train.setup import make_method
from rankwise.train.skeleton import make_skeleton

__all__ = ["AdditionPlan", "LayerPlan", "ModelPlan", "plan_model"]


@dataclass(frozen=True)
class LayerPlan:
    """One layer that would be adapted: its function's shape (out, in), rank, α, parameters."""

    name: str
    type: str
    shape: tuple[int, int]
    r: int
    alpha: float
    scale: float
    parameters: int


@dataclass(frozen=True)
class AdditionPlan:
    """What else would be added: to which module, of what kind, in how many parameters."""

    name: str
    kind: str
    parameters: int


@dataclass(frozen=True)
class ModelPlan:
    """What would be adapted and trained.

    Attributes:
        model: where the config came from.
        layers: the layers with a low-rank update, in the model's order.
        additions: biases, bottlenecks and prefixes, in the model's order.
        counts: parameters of the base, the updates, the head, and all that trains.
        memory: bytes of the frozen base (float32 and bfloat16), and of the trained parameters,
            their gradients and AdamW's two moments, all float32; and of the tensors in the
            adapter's file, whose header adds some hundred bytes for each.
        notes: what a user should know.
    """

    model: str
    layers: tuple[LayerPlan, ...]
    additions: tuple[AdditionPlan, ...]
    counts: dict[str, int | None]
    memory: dict[str, int]
    notes: tuple[str, ...]


def plan_model(config: FitConfig, labels: int = 2) -> ModelPlan:
    """Build the model on the meta device, attach the method, and read off what happened.

    Args:
        config: model, task and method options; "auto" as the task means what the architecture
            named in the model's config does, or classification.
        labels: classes of a classification head.

    Raises:
        UserError: the model or the method's targets cannot be had; see ``attach``.
        ArtifactError: the config is damaged.
        EnvironmentFault: transformers is not installed, or the hub cannot be reached.
    """
    model, task = make_skeleton(config.model, config.task, labels, config.revision)
    base = Base(model, None, config.model, "", (), None)  # type: ignore[arg-type]
    kinds = {name: type(target.site.base).__name__ for name, target in targets_of(model).items()}
    done = attach(model, make_method(config, base))
    layers = tuple(
        _layer_plan(name, kinds[name], update) for name, update in low_rank_updates(model).items()
    )
    additions = tuple(
        AdditionPlan(name, _kind(update), sum(p.numel() for p in update.trained()))
        for name, update in updates_of(model).items()
        if not isinstance(update, LowRank)
    )
    numbers = counts(model)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = numbers["trainable"] or 0
    memory = {
        "base_float32": 4 * frozen,
        "base_bfloat16": 2 * frozen,
        "trained": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "adapter_file": file_bytes(model, done.method),
    }
    notes = [f"Task: {task}.", *done.notes]
    if isinstance(done.method, LoRA) and not head_modules(model):
        notes.append("The model has no output layer; what is adapted is an encoder alone.")
    return ModelPlan(config.model, layers, additions, numbers, memory, tuple(notes))


def _layer_plan(name: str, kind: str, update: LowRank) -> LayerPlan:
    shape = (update.layout.out_features, update.layout.in_features)
    spec = update.spec
    number = count(*shape, spec.r) * (update.layout.experts or 1)
    return LayerPlan(name, kind, shape, spec.r, spec.alpha, spec.scale, number)


def _kind(update: Update) -> str:
    """What an update is, in words."""
    if isinstance(update, Network):
        size, _ = update.down.shape
        return f"bottleneck of {size}, {update.activation.value}"
    if isinstance(update, FreePrefix):
        heads, length, _ = update.keys.shape
        return f"prefix of {length} for {heads} heads"
    if isinstance(update, Offset):
        return f"trained {update.layout.parameter}"
    return type(update).__name__
