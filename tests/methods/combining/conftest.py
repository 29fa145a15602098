"""A model with every kind of adapted weight, and adapters of it whose numbers are random."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.methods.adapter import Adapter

IDS = torch.tensor([[1, 2, 3, 8], [0, 1, 5, 5]])


class Experts(nn.Module):
    """A bank of three weights (3, out, in), the outputs added up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, width, width) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bti->bto", self.up, x)


class Model(nn.Module):
    """Embedding, fused projection, bank, plain layers, and a name that is the end of another."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, width)
        self.fused = nn.Linear(width, 2 * width)
        self.experts = Experts(width)
        self.body = nn.Linear(width, width)
        self.inner = nn.ModuleDict({"body": nn.Linear(width, width)})
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        left, right = self.fused(x).chunk(2, dim=-1)
        x = self.norm(self.experts(torch.tanh(left) * right) + x)
        return self.head(self.inner["body"](torch.tanh(self.body(x))))


SPLIT = {"fused": rw.Split(("left", "right"))}


@pytest.fixture
def model() -> Model:
    return Model().double().eval()


@pytest.fixture
def make(model: Model) -> Callable[..., Adapter]:
    """Make an adapter of the model, all that it trains filled with random numbers."""

    def adapter(*targets: str, **options: Any) -> Adapter:
        one = copy.deepcopy(model)
        split = SPLIT if any(t.startswith("fused.") for t in targets) else {}
        options = {"r": 2, "head": "freeze", "split": split, **options}
        rw.attach(one, rw.LoRA(target_modules=targets, **options))
        with torch.no_grad():
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
        return rw.adapter_of(one)

    return adapter
