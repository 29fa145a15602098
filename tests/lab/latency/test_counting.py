"""Counts of operators and floating-point operations, by hand; and what is not the same is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.lab.latency.counting import count_pass, sameness
from rankwise.lab.latency.variants import make_models
from rankwise.train.config import make_config
from rankwise.train.skeleton import make_skeleton

PROBE = {"input_ids": torch.tensor([[3, 5, 7, 9]]), "attention_mask": torch.ones(1, 4).long()}


class Two(nn.Module):
    """Two products of 5 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.second(torch.relu(self.first(x)))


def test_a_pass_is_counted_as_by_hand() -> None:
    counts = count_pass(Two(), {"x": torch.zeros(5, 4)})
    assert counts.flops == 2 * 5 * (4 * 8 + 8 * 3)
    assert counts.operators["aten.addmm.default"] == 2
    assert counts.operators["aten.relu.default"] == 1


def test_products_in_place_and_attention_on_a_cpu_count() -> None:
    class Others(nn.Module):
        def forward(self, x: Any) -> Any:
            torch.zeros(5, 6).addmm_(torch.ones(5, 4), torch.ones(4, 6))
            return nn.functional.scaled_dot_product_attention(x, x, x)

    counts = count_pass(Others(), {"x": torch.zeros(1, 2, 7, 8)})
    assert counts.flops == 2 * 5 * 4 * 6 + 2 * (2 * 2 * 7 * 7 * 8)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_merged_is_the_very_same_computation_and_unmerged_is_not(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    plain, _ = make_skeleton(str(folder), device="cpu")
    config = make_config({"model": str(folder), "data": "", "out": ""}, "test")
    models = make_models(plain.requires_grad_(False), config, PROBE)
    counts = {name: count_pass(model, PROBE) for name, model in models.by_name.items()}

    def against(other: str) -> Any:
        both = counts["plain"], counts[other]
        return sameness(plain, models.by_name[other], both, models.certificate)

    merged = against("merged")
    assert merged.same
    assert merged.modules
    assert merged.operators
    assert merged.flops
    assert merged.error <= merged.tolerance < merged.effect
    for other in ("LoRA, unmerged", "adapter, Houlsby", "adapter, Pfeiffer"):
        assert counts[other].flops > counts["plain"].flops
        assert not against(other).modules
        assert not against(other).operators
    # r · (in + out) more multiply-adds for each token and adapted layer
    layers = {"bert": 4 * (32 + 32), "gpt2": 2 * (32 + 96), "llama": 2 * (32 + 32) + 2 * (32 + 16)}
    more = counts["LoRA, unmerged"].flops - counts["plain"].flops
    if name != "gpt2":  # whose fused projection is adapted in two of its three parts
        assert more == 2 * 4 * 8 * layers[name]
