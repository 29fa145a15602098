"""What trains on a model as an optimiser's groups, with rates of their own for B and the head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from rankwise.attaching import lora_layers, trained_copies, updates_of
from rankwise.errors import UserError
from rankwise.layers import LowRank, Update
from rankwise.targets import find_head

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    name: str | None = None,
    lora_plus: float = 1.0,
    head: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """What trains on a model, or in one adapter of it, as groups for any optimiser of torch.

    With ``name`` they are those of the adapter of this name, with its head also where that does not
    hang in the model now: several adapters that train together have rates of their own so.

    The learning rate of every low-rank factor that starts at zero (B; of an embedding A) is
    ``lora_plus`` · lr, that of everything else lr. LoRA+ (Hayou et al. 2024, arXiv 2402.12354,
    section 4) shows that for wide layers the two need different rates, and proposes a ratio of 16
    with a correspondingly smaller lr; 1 is plain LoRA. An output layer that trains whole has the
    rate ``head`` · lr: a new one starts from noise, and wants steps many times as large as what is
    adapted. Vectors (biases, magnitudes, normalisation
    weights) do not decay, as is usual; matrices do. Each group has the keys ``params``, ``lr``,
    ``ratio`` and ``weight_decay``; empty ones are left out.

    Raises:
        UserError: a ratio is not a finite number (of at least 1 for ``lora_plus``, above 0 for
            ``head``), nothing trains, or there is no adapter of this name.
    """
    if not math.isfinite(lora_plus) or lora_plus < 1:
        raise UserError(f"lora_plus must be a finite ratio of 1 or more, got {lora_plus!r}.")
    if not math.isfinite(head) or head <= 0:
        raise UserError(f"head must be a finite ratio above 0, got {head!r}.")
    held = model.parameters() if name is None else _parameters(model, name)
    trained = [p for p in held if p.requires_grad]
    if not trained:
        raise UserError("Nothing trains on this model. Attach a method first (rankwise.attach).")
    ratios = {id(p): head for p in _output_layer(model, name)}
    ratios |= {id(p): lora_plus for p in _zero_starts(model)}
    groups: list[dict[str, Any]] = [
        {
            "params": [
                p for p in trained if ratios.get(id(p), 1.0) == ratio and (p.ndim > 1) == matrix
            ],
            "lr": lr * ratio,
            "ratio": ratio,
            "weight_decay": weight_decay if matrix else 0.0,
        }
        for ratio in dict.fromkeys((1.0, lora_plus, head))
        for matrix in (True, False)
    ]
    return [group for group in groups if group["params"]]


def _output_layer(model: nn.Module, name: str | None) -> Iterator[nn.Parameter]:
    """The parameters of the output layer, or of the copies that an adapter has of it."""
    head = find_head(model)
    if name is None:
        parts = [model.get_submodule(part) for part in head.names]
    else:
        parts = [m for n, m in trained_copies(model, name).items() if head.holds(n)]
    for part in parts:
        beside = {id(p) for m in part.modules() if isinstance(m, Update) for p in m.parameters()}
        yield from (p for p in part.parameters() if id(p) not in beside)


def _parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The parameters of one adapter's updates and trained copies, each once."""
    parts = [*updates_of(model, name).values(), *trained_copies(model, name).values()]
    yield from dict.fromkeys(p for part in parts for p in part.parameters())


def _zero_starts(model: nn.Module) -> Iterator[nn.Parameter]:
    """B of every low-rank update, and A of an embedding's."""
    for layer in lora_layers(model).values():
        for update in layer.updates.values():
            if isinstance(update, LowRank):
                yield update.lora_A if layer.lookup else update.lora_B
