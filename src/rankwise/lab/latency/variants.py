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
    models = {PLAIN: plain, MERGED: _adapted(plain, lora), UNMERGED: _adapted(plain, lora)}
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
    }
    certificate = merge(models[MERGED], keep=False, probe=probe)
    for model in models.values():
        model.eval()
    return Models(models, added | {MERGED: 0}, certificate, tuple(notes))


def _adapted(plain: nn.Module, config: FitConfig) -> nn.Module:
    """A copy of the model with a method attached; the same random numbers at each call."""
    shared: dict[int, Any] = {id(t): t for t in (*plain.parameters(), *plain.buffers())}
    model: Any = copy.deepcopy(plain, shared)
    base = Base(model, None, config.model, "", (), None)  # type: ignore[arg-type]
    attach(model, make_method(config, base))
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for update in updates_of(model).values():
            tensors = [update.lora_B] if isinstance(update, LowRank) else list(update.trained())
            for tensor in tensors:
                drawn = torch.randn(tensor.shape, generator=generator) * _SPREAD
                tensor.add_(drawn.to(tensor))
    return model
