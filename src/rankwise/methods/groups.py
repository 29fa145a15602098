"""LoRA+: what trains on a model as an optimiser's groups, with a faster rate for one factor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from rankwise.attaching import lora_layers
from rankwise.errors import UserError
from rankwise.layers import LowRank

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, lr: float, *, lora_plus: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What trains on a model as groups for any optimiser of torch.

    The learning rate of every low-rank factor that starts at zero (B; of an embedding A) is
    ``lora_plus`` · lr, that of everything else lr. LoRA+ (Hayou et al. 2024, arXiv 2402.12354,
    section 4) shows that for wide layers the two need different rates, and proposes a ratio of 16
    with a correspondingly smaller lr; 1 is plain LoRA. Vectors (biases, magnitudes, normalisation
    weights) do not decay, as is usual; matrices do. Each group has the keys ``params``, ``lr``,
    ``ratio`` and ``weight_decay``; empty ones are left out.

    Raises:
        UserError: the ratio is not a finite number of at least 1, or nothing trains.
    """
    if not math.isfinite(lora_plus) or lora_plus < 1:
        raise UserError(f"lora_plus must be a finite ratio of 1 or more, got {lora_plus!r}.")
    faster = {id(p) for p in _zero_starts(model)} if lora_plus != 1 else set[int]()
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("Nothing trains on this model. Attach a method first (rankwise.attach).")
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trained if (id(p) in faster) == fast and (p.ndim > 1) == matrix],
            "lr": lr * (lora_plus if fast else 1.0),
            "ratio": lora_plus if fast else 1.0,
            "weight_decay": weight_decay if matrix else 0.0,
        }
        for fast in (False, True)
        for matrix in (True, False)
    ]
    return [group for group in groups if group["params"]]


def _zero_starts(model: nn.Module) -> Iterator[nn.Parameter]:
    """B of every low-rank update, and A of an embedding's."""
    for layer in lora_layers(model).values():
        for update in layer.updates.values():
            if isinstance(update, LowRank):
                yield update.lora_A if layer.lookup else update.lora_B
