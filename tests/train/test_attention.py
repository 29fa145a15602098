"""Attention by plain products on short rows: where it is measured, and that steps compute it so."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rankwise.train import attention, frozen
from rankwise.train.attention import attending, products_up_to
from rankwise.train.config import FitConfig
from rankwise.train.run import fit


def model(dtype: torch.dtype, **config: object) -> nn.Module:
    made = nn.Linear(2, 2)
    made.dtype, made.config = dtype, SimpleNamespace(**config)
    return made


HEADS = {"num_attention_heads": 2, "hidden_size": 16, "_attn_implementation": "sdpa"}


@pytest.mark.parametrize(
    ("last", "longest", "found"),
    [(256, 300, 256), (64, 300, 64), (256, 40, 64), (256, 8, 32), (0, 300, 0)],
)
def test_it_is_the_longest_up_to_which_products_are_faster(
    last: int, longest: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def faster(length: int, *shape: object) -> bool:
        asked.append(shape)
        return length <= last

    monkeypatch.setattr(attention, "_faster", faster)
    assert products_up_to(model(torch.bfloat16, **HEADS), longest) == found
    assert set(asked) == {(2, 8, torch.bfloat16, True)}


def test_where_only_the_head_trains_forward_alone_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(attention, "_faster", lambda *asks: asked.append(asks[-1]))
    made = model(torch.bfloat16, **HEADS)
    made.base_model = nn.Linear(2, 2).requires_grad_(False)
    products_up_to(made, 30)
    made.base_model.bias.requires_grad_()
    products_up_to(made, 30)
    assert asked == [False, True]


@pytest.mark.parametrize(
    "other",
    [
        model(torch.float32, **HEADS),
        model(torch.bfloat16, hidden_size=16, _attn_implementation="sdpa"),
        model(torch.bfloat16, **{**HEADS, "_attn_implementation": "eager"}),
        nn.Linear(2, 2),
    ],
)
def test_in_float32_or_without_known_heads_or_the_function_nothing_is_measured(
    other: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(attention, "_faster")
    assert products_up_to(other, 30) == 0


@pytest.mark.parametrize("trains", [True, False])
def test_the_measurement_runs_both_ways_and_draws_nothing(trains: bool) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.profiler.profile() as profile:
        assert attention._faster(8, 2, 8, torch.bfloat16, trains) in (True, False)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_dot_product_attention_math"] == attention._ROUNDS
    assert any("backward" in name.lower() for name in calls) is trains
    assert torch.equal(torch.get_rng_state(), before)


def kernels(length: int, longest: int) -> set[str]:
    q = torch.randn(1, 2, length, 8, requires_grad=True)
    with torch.profiler.profile() as profile, attending(longest, length):
        F.scaled_dot_product_attention(q, q, q)
    return {event.key for event in profile.key_averages() if "attention_" in event.key}


def test_rows_up_to_that_length_are_computed_by_products_and_longer_ones_are_not() -> None:
    assert kernels(8, 8) == {"aten::_scaled_dot_product_attention_math"}
    assert "aten::_scaled_dot_product_attention_math" not in kernels(9, 8)


def test_the_steps_of_a_run_compute_it_so_and_its_evaluations_do_not(
    options: Callable[..., FitConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "products_up_to", lambda *_: 256)
    with torch.profiler.profile() as profile:
        made = fit(options(tmp_path / "run", max_steps=2))
    assert made.manifest["hardware"]["attention_by_products"] == 256
    calls = {event.key: event.count for event in profile.key_averages()}
    layers = made.model.config.num_hidden_layers
    assert calls["aten::_scaled_dot_product_attention_math"] == 2 * layers
