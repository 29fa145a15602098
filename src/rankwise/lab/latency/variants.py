"""The models that are measured: one base, plain and with each kind of adapter, weights shared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.attaching import attach, updates_of
from rankwise.errors import UserError
from rankwise.lab.latency.records import MERGED, PLAIN, UNMERGED
from rankwise.layers import LowRank
from rankwise.merging import Certificate, merge
from rankwise.train.config import FitConfig
from rankwise.train.model import Base
from rankwise.train.setup import make_method

__all__ = ["Models", "make_models"]

_SPREAD = 0.02  # of the numbers that stand for trained ones


@dataclass(frozen=True)
class Models:
    """The models by name, the plain one first, what merging was certified to be, and notes.

    ``added`` is the number of parameters of each beside the plain one's.
    """

    by_name: dict[str, nn.Module]
    added: dict[str, int]
    certificate: Certificate
    notes: tuple[str, ...]


def make_models(plain: nn.Module, config: FitConfig, probe: dict[str, Tensor]) -> Models:
    """The variants of a model, in evaluation mode.

    The copies share every tensor that is not changed. What would be trained is random, so that
    each adapter has an effect. A method that this model cannot have is told in the notes.

    Args:
        plain: the base.
        config: the options of the methods.
        probe: inputs of the model, on which the merge is certified.

    Raises:
        UserError: LoRA's targets cannot be had; see ``attach``.
        MergeError: the merged model does not compute what the unmerged one does.
    """
    frozen = {"head": "freeze"}
    kinds: dict[str, dict[str, Any]] = {
        "adapter, Houlsby": {"method": "bottleneck", "adapter_placement": "houlsby"},
        "adapter, Pfeiffer": {"method": "bottleneck", "adapter_placement": "pfeiffer"},
        "prefix": {"method": "prefix"},
    }
    lora = config.model_copy(update=frozen | {"method": "lora"})
    unmerged = _adapted(plain, lora)
    models = {PLAIN: plain, MERGED: _copied(unmerged), UNMERGED: unmerged}
    notes: list[str] = []
    for name, values in kinds.items():
        options = config.model_copy(update=frozen | values | {"target_modules": None})
        try:
            models[name] = _adapted(plain, options)
        except UserError as error:
            notes.append(f"{name} is not measured: {error}")
    added = {
        name: sum(p.numel() for update in updates_of(model).values() for p in update.trained())
        for name, model in models.items()
        if name != PLAIN
    }
    certificate = merge(models[MERGED], keep=False, probe=probe)
    for model in models.values():
        model.eval()
    return Models(models, added | {PLAIN: 0, MERGED: 0}, certificate, tuple(notes))


def _copied(model: nn.Module) -> Any:
    """Modules of its own around the same tensors."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _adapted(plain: nn.Module, config: FitConfig) -> nn.Module:
    """A copy of the model with a method attached, its effect not zero."""
    model = _copied(plain)
    base = Base(model, None, config.model, "", (), None)  # type: ignore[arg-type]
    attach(model, make_method(config, base))
    with torch.no_grad():
        for update in updates_of(model).values():
            tensors = [update.lora_B] if isinstance(update, LowRank) else update.trained()
            for tensor in tensors:
                tensor.add_(torch.randn_like(tensor) * _SPREAD)
    return model
