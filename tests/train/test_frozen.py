"""How a model runs while it trains: its dropout, and kernels that a run keeps when it goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import rankwise as rw
from rankwise.kernels import can_pack
from rankwise.layers import LowRank, is_packed
from rankwise.layers.dropping import BySeed
from rankwise.train.config import FitConfig
from rankwise.train.frozen import Kernels, choose_kernels, recompute_frozen, train_mode
from rankwise.train.reporter import Silent
from rankwise.train.run import fit


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.dropout(self.query(x)))


def adapted() -> Model:
    model = Model()
    rw.attach(
        model,
        rw.LoRA(
            2, 4, target_modules=["query"], head="freeze", modules_to_save=["out"], dropout=0.1
        ),
    )
    return model


def test_the_base_is_quiet_and_what_trains_is_not() -> None:
    model = adapted()
    train_mode(model, base_dropout=False)
    modes = {name: module.training for name, module in model.named_modules()}
    loud = {name for name, training in modes.items() if training}
    assert loud == {"", "query.updates.default", "out", "out.0", "out.1"}
    assert any(isinstance(m, LowRank) and m.training for m in model.modules())
    train_mode(model, base_dropout=True)
    assert all(module.training for module in model.modules())


def test_dropout_that_a_block_computes_by_itself_is_quiet_too() -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 1}
    opt = OPTForCausalLM(OPTConfig(**sizes, vocab_size=64, num_attention_heads=2))
    rw.attach(opt, rw.LoRA(r=2, target_modules=["q_proj"], head="freeze"))
    ids = torch.randint(5, 50, (2, 9))
    train_mode(opt, base_dropout=False)
    assert torch.equal(opt(input_ids=ids).logits, opt(input_ids=ids).logits)
    train_mode(opt, base_dropout=True)
    assert not torch.equal(opt(input_ids=ids).logits, opt(input_ids=ids).logits)


def test_a_run_that_goes_on_takes_the_same_kernels() -> None:
    if not can_pack(torch.zeros(1, 1)):  # pragma: no cover
        pytest.skip("this torch has no oneDNN to pack weights for")
    model = adapted().requires_grad_(False)
    made = Kernels(("query.base_layer",), seeded_dropout=True, attention_by_products=64)
    again = json.loads(json.dumps({"hardware": made.record()}))
    assert choose_kernels(model, [3, 5], 4, again, Silent()) == made
    assert [n for n, m in model.named_modules() if is_packed(m)] == ["query.base_layer"]
    drops = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert drops
    assert all(isinstance(m.forward, BySeed) for m in drops)


def test_a_run_of_an_earlier_version_goes_on_with_the_kernels_it_had() -> None:
    model = adapted().requires_grad_(False)
    assert choose_kernels(model, [3], 4, {"hardware": {"packed": []}}, Silent()) == Kernels()
    assert not any("forward" in vars(m) for m in model.modules())


def test_the_manifest_names_the_kernels(options: Callable[..., FitConfig], tmp_path: Path) -> None:
    result = fit(options(tmp_path / "auto", max_steps=1))
    hardware = result.manifest["hardware"]
    linears = {n for n, m in result.model.named_modules() if isinstance(m, nn.Linear)}
    assert set(hardware["packed"]) <= linears
    assert isinstance(hardware["seeded_dropout"], bool)
    assert hardware["attention_by_products"] == 0  # in float32
    assert not any("forward" in vars(m) for m in result.model.modules())
    plain = fit(options(tmp_path / "no", max_steps=1, pack="no")).manifest["hardware"]
    assert {n: plain[n] for n in Kernels().record()} == Kernels().record()


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_what_runs_again_is_told() -> None:
    reporter = Notes()
    recompute_frozen(adapted(), reporter)
    base = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh())
    recompute_frozen(base, reporter)
    assert reporter.notes == [
        "Run again in backward: nothing, as no module qualifies.",
        "Run again in backward: activations 1.",
    ]


@pytest.mark.parametrize(
    "more", [{}, {"cache": 1.0, "layers": "1"}, {"method": "bottleneck"}, {"method": "full"}]
)
def test_a_run_that_recomputes_is_the_run_that_does_not(
    more: dict[str, Any], options: Callable[..., FitConfig], tmp_path: Path
) -> None:
    states = []
    for on in (False, True):
        config = options(tmp_path / str(on), recompute=on, max_steps=3, **more)
        states.append({n: t.clone() for n, t in fit(config).model.state_dict().items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
