"""Models with three adapters, and each row of a batch run by itself with its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import updates_of
from zoo import Zoo

NAMES = ("a", "b", "c")
IDS = torch.randint(1, 24, (6, 5), generator=torch.Generator().manual_seed(7))
MIXED = ["b", "a", None, "c", "a", "b"]
SORTED = ["a", "a", "b", None, None, "c"]
TARGETS: tuple[str, ...] = ("mix", "keys", "values", "fused", "turn", "image", "linear1", "linear2")

Methods = Callable[[int], Any]


def lora(i: int, **options: Any) -> rw.LoRA:
    """The i-th adapter: each has a rank of its own, and leaves out a layer."""
    asked = {"target_modules": TARGETS[:i] + TARGETS[i + 1 :], "head": "freeze", **options}
    return rw.LoRA(r=1 + i, alpha=3.0 + i, **asked)


def move(model: nn.Module, names: Sequence[str] = NAMES) -> None:
    """Numbers in all that trains, as after training."""
    with torch.no_grad():
        for name in names:
            for update in updates_of(model, name).values():
                for p in update.trained():
                    p.add_(torch.randn_like(p) * 0.2)
            for copy in rw.attachment(model, name).copies.values():
                for p in copy.parameters():
                    p.add_(torch.randn_like(p) * 0.2)


def several(method: Methods, model: nn.Module | None = None) -> nn.Module:
    model = Zoo().double().requires_grad_(False).eval() if model is None else model
    for i, name in enumerate(NAMES):
        rw.attach(model, method(i), name=name)
    move(model)
    return model


def alone(model: nn.Module, names: Sequence[Any], x: Tensor) -> Tensor:
    """Each row by itself with its adapter."""
    found = []
    for i, name in enumerate(names):
        own = () if name is None else (name,) if isinstance(name, str) else name
        with rw.using(model, *own):
            found.append(model(x[i : i + 1]))
    return torch.cat(found)


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Pair(nn.Module):
    """Two layers and a head, in float64."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(6, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, classes)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.values(torch.tanh(self.keys(x)))))


def headed(i: int) -> rw.LoRA:
    return rw.LoRA(r=i + 1, target_modules=["keys", "values"], head="train")


def lora_pair(i: int, **options: Any) -> rw.LoRA:
    return rw.LoRA(r=i + 1, target_modules=["keys", "values"], head="freeze", **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of all that trains in the adapters, by adapter and name."""
    found: dict[str, Tensor] = {}
    for name, record in rw.attachments(model).items():
        parts = {**updates_of(model, name), **record.copies}
        for place, module in parts.items():
            for key, p in module.named_parameters():
                if p.grad is not None:
                    found[f"{name} {place} {key}"] = p.grad
                    p.grad = None
    return found
