"""A frozen network whose target differs from it by known ranks: inspect and advise find them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.lab.advising.choosing import Judge, search
from rankwise.lab.advising.records import EVERY_LAYER, PER_LAYER, smallest
from rankwise.lab.advising.running import silenced
from rankwise.lab.inspecting import inspect_adapter
from rankwise.methods.adapter import Adapter, adapter_of
from rankwise.methods.trimming import cut_to, layers_of
from rankwise.train.answers import Answers
from rankwise.train.trying import Quality

LAYERS, R, ROWS, HELD, STEPS = ("first", "second"), 10, 1024, 256, 300


class Network(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 22), nn.Linear(22, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def planted(network: Network, ranks: tuple[int, int]) -> Network:
    """A copy whose weights differ by matrices of these ranks, singular values from 1 to 2."""
    target = copy.deepcopy(network)
    for layer, k in zip((target.first, target.second), ranks, strict=True):
        left = torch.linalg.qr(torch.randn(layer.out_features, k)).Q
        right = torch.linalg.qr(torch.randn(layer.in_features, k)).Q
        layer.weight.data += left * (1 + torch.rand(k)) @ right.T
    return target


def trained(network: Network, x: Tensor, y: Tensor) -> None:
    """LoRA on both layers, trained by Adam on all rows at once."""
    rw.attach(network, rw.LoRA(r=R, alpha=R, target_modules=list(LAYERS)))
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.03)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()
        fall.step()


def quality(plain: Network, adapter: Adapter, x: Tensor, y: Tensor) -> Quality:
    """Squared errors by row of the plain network with an adapter's updates added to its weights."""
    changed = copy.deepcopy(plain)
    for name, factors in adapter.factors.items():
        changed.get_submodule(name).weight.data += factors.delta()
    with torch.no_grad():
        losses = (changed(x) - y).square().sum(1).double().numpy()
    rows = np.arange(len(losses))
    return Quality(
        {"loss": float(losses.mean())}, Answers(rows, losses, np.ones(len(rows), dtype=np.int64))
    )


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("seed", "ranks"), list(enumerate([(1, 3), (5, 2), (8, 4)])))
def test_inspect_and_advise_find_the_ranks_of_every_layer(
    seed: int, ranks: tuple[int, int], noise: float, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    plain = Network()
    target = planted(plain, ranks)
    x = torch.randn(ROWS + HELD, 24)
    with torch.no_grad():
        y = target(x) + noise * torch.randn(len(x), 20)
    network = copy.deepcopy(plain)
    trained(network, x[:ROWS], y[:ROWS])

    rw.save_adapter(network, tmp_path)
    found = inspect_adapter(tmp_path).layers
    assert [(layer.name, layer.spectrum.gap and layer.spectrum.gap.k) for layer in found] == list(
        zip(LAYERS, ranks, strict=True)
    )

    whole = adapter_of(network)

    def tried(adapter: Adapter) -> Quality:
        return quality(plain, adapter, x[ROWS:], y[ROWS:])

    def cut(chosen: Mapping[str, int]) -> Quality:
        return tried(cut_to(whole, chosen))

    judge = Judge("loss", tried(whole), tried(silenced(whole)))
    assert judge.gained
    trials = list(search(layers_of(whole), R, judge, cut))
    same = smallest([t for t in trials if t.kind == EVERY_LAYER])
    own = smallest([t for t in trials if t.kind == PER_LAYER])
    assert same is not None
    assert own is not None
    assert same.size == max(ranks)
    assert tuple(own.ranks[name] for name in LAYERS) == ranks
