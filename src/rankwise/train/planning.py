"""What a method would adapt and train on a model, told from its config alone, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankwise.attaching import attach, lora_layers
from rankwise.lowrank import count
from rankwise.methods.head import head_modules
from rankwise.methods.lora import LoRA
from rankwise.train.config import FitConfig
from rankwise.train.manifest import counts
from rankwise.train.model import (
    AUTO_CLASSES,
    Base,
    import_transformers,
    load_config,
    quiet_transformers,
)
from rankwise.train.setup import make_method

__all__ = ["LayerPlan", "ModelPlan", "plan_model"]


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
class ModelPlan:
    """What would be adapted and trained.

    Attributes:
        model: where the config came from.
        layers: the adapted layers, in the model's order.
        counts: parameters of the base, the updates, the head, and all that trains.
        memory: bytes of the frozen base (float32 and bfloat16), and of the trained parameters,
            their gradients and AdamW's two moments, all float32; and of the adapter file.
        notes: what a user should know.
    """

    model: str
    layers: tuple[LayerPlan, ...]
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
    """
    settings = load_config(config.model, config.revision)
    task = config.task if config.task != "auto" else _task_of(settings)
    if task == "classification":
        settings.num_labels = labels
    elif task == "regression":
        settings.num_labels = 1
    model = _skeleton(settings, task)
    base = Base(model, None, config.model, "", (), None)  # type: ignore[arg-type]
    sizes = dict(model.named_modules())
    done = attach(model, make_method(config, base))
    layers = tuple(
        LayerPlan(
            name,
            type(sizes[name]).__name__,
            (layer.lora_B.shape[0], layer.lora_A.shape[1]),
            layer.spec.r,
            layer.spec.alpha,
            layer.scale,
            count(layer.lora_B.shape[0], layer.lora_A.shape[1], layer.spec.r),
        )
        for name, layer in lora_layers(model).items()
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
        "adapter_file": 4 * trained,
    }
    notes = [f"Task: {task}.", *done.notes]
    if isinstance(done.method, LoRA) and not head_modules(model):
        notes.append("The model has no output layer; what is adapted is an encoder alone.")
    return ModelPlan(config.model, layers, numbers, memory, tuple(notes))


def _task_of(settings: Any) -> str:
    """The task that a model's config names by its architecture."""
    names = settings.architectures or []
    return "causal-lm" if any("LMHead" in n or "CausalLM" in n for n in names) else "classification"


def _skeleton(settings: Any, task: str) -> nn.Module:
    transformers = import_transformers()
    with torch.device("meta"), quiet_transformers():
        return getattr(transformers, AUTO_CLASSES[task]).from_config(settings)
