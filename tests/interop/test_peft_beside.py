"""What trains beside A and B, several adapters, and starts: the same numbers as PEFT."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.inits import OLoRA, PiSSA
from rankwise.layers import TokenRows
from twins import (
    ALPHA,
    One,
    R,
    backward,
    compare,
    copy_over,
    gradient_errors,
    relative,
    shuffle,
    twins,
    two,
    with_peft,
    with_rankwise,
)

peft = pytest.importorskip("peft")


# --- what trains beside A and B ------------------------------------------------------------------


@pytest.mark.parametrize(("word", "option"), [("lora_only", "adapted"), ("all", "all")])
def test_trained_biases_of_the_base(word: str, option: str):
    base, x = two()
    ours, theirs = twins(
        base,
        {"target_modules": ["first"], "bias": option},
        {"target_modules": ["first"], "bias": word},
    )
    inner = theirs.get_submodule("base_model.model")
    biases = {
        "first.bias": inner.get_parameter("first.base_layer.bias"),
        "second.bias": inner.get_parameter("second.bias"),
    }
    mine = {n: u for n, u in updates_of(ours).items() if n in biases}
    assert set(mine) == {n for n, b in biases.items() if b.requires_grad}
    with torch.no_grad():
        for name, update in mine.items():
            change = torch.randn_like(biases[name])
            biases[name].add_(change)
            update.offset.copy_(change)
    compare(ours, theirs, x, 1e-13)
    for name, update in mine.items():
        assert relative(update.offset.grad, biases[name].grad) < 1e-13


def test_lora_bias_is_a_trained_bias_divided_by_the_scale():
    base, x = two()
    ours, theirs = twins(
        base,
        {"target_modules": ["first"], "bias": "adapted"},
        {"target_modules": ["first"], "lora_bias": True},
    )
    bias = theirs.get_parameter("base_model.model.first.lora_B.default.bias")
    change, scale = updates_of(ours)["first.bias"].offset, ALPHA / R
    with torch.no_grad():
        bias.normal_()
        change.copy_(scale * bias)
    compare(ours, theirs, x, 1e-13)
    assert relative(scale * change.grad, bias.grad) < 1e-13


def test_a_frozen_down_projection_is_lora_fa():
    from peft.optimizers import create_lorafa_optimizer

    base, x = two()
    names = {"target_modules": ["first", "second"]}
    ours, theirs = twins(base, {**names, "freeze_A": True}, names)
    create_lorafa_optimizer(theirs, r=R, lora_alpha=ALPHA, lr=0.1)  # it freezes A
    compare(ours, theirs, x, 1e-13)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {"first.updates.default.lora_B", "second.updates.default.lora_B"}
    assert all(("lora_B" in n) == p.requires_grad for n, p in theirs.named_parameters())


def test_a_module_that_trains_whole():
    base, x = two()
    ours, theirs = twins(
        base,
        {"target_modules": ["first"], "head": "train"},
        {"target_modules": ["first"], "modules_to_save": ["second"]},
    )
    head = theirs.get_submodule("base_model.model.second.modules_to_save.default")
    with torch.no_grad():
        for other, mine in zip(head.parameters(), ours.second.parameters(), strict=True):
            other.normal_()
            mine.copy_(other)
    compare(ours, theirs, x, 1e-13)
    for other, mine in zip(head.parameters(), ours.second.parameters(), strict=True):
        assert relative(mine.grad, other.grad) < 1e-13


def llama(tied: bool) -> nn.Module:
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).double()


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "head of its own"])
def test_trained_token_rows(tied: bool):
    base = llama(tied)
    names = {"target_modules": ["q_proj"]}
    ours, theirs = twins(
        base,
        {**names, "trainable_tokens": {"embed_tokens": [3, 7]}},
        {**names, "trainable_token_indices": [3, 7]},
    )
    [rows] = [p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n]
    [mine] = [u for u in updates_of(ours).values() if isinstance(u, TokenRows)]
    with torch.no_grad():
        mine.token_delta.normal_()
        rows.add_(mine.token_delta)  # PEFT keeps the new rows, Rankwise what is added
    ids = torch.randint(0, 24, (2, 9))
    ids[:, 2:4] = torch.tensor([3, 7])
    compare(ours, theirs, ids, 1e-12)
    assert relative(mine.token_delta.grad, rows.grad) < 1e-12


# --- several adapters ----------------------------------------------------------------------------


def stacked(dora: bool) -> tuple[nn.Module, Any, Tensor]:
    base, x = two()
    names = {"target_modules": ["first", "second"]}
    ours, theirs = twins(base, {**names, "dora": dora}, {**names, "use_dora": dora})
    second = {"r": 2, "target_modules": ["first"]}
    theirs.add_adapter("second", peft.LoraConfig(lora_alpha=3, use_dora=dora, **second))
    with_rankwise(ours, "second", alpha=3, dora=dora, **second)
    shuffle(theirs, 2, "second")
    copy_over(theirs, ours, "second")
    theirs.base_model.set_adapter(["default", "second"])
    return ours, theirs, x


def test_two_adapters_that_act_together():
    ours, theirs, x = stacked(dora=False)
    compare(ours, theirs, x, 1e-13)
    assert max(gradient_errors(theirs, ours, "second")) < 1e-13
    theirs.base_model.set_adapter(["second"])
    rw.set_active(ours, "second")
    assert relative(ours(x), theirs(x)) < 1e-13


def test_the_order_of_two_magnitudes_matters_there_and_not_here():
    ours, theirs, x = stacked(dora=True)
    orders = (["default", "second"], ["second", "default"])
    here, there = [], []
    for order in orders:
        rw.set_active(ours, *order)
        here.append(ours(x))
        theirs.base_model.set_adapter(order)
        there.append(theirs(x))
    assert relative(*here) < 1e-13
    assert relative(*there) > 1e-3


# --- starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "word", "start"),
    [
        (nn.Linear(12, 9), "pissa", PiSSA()),
        (Conv1D(9, 12), "pissa", PiSSA()),
        (nn.Linear(12, 9), "olora", OLoRA()),
    ],
    ids=["pissa, linear", "pissa, conv1D", "olora, linear"],
)
def test_starts_from_the_weight_take_the_same_step(layer: nn.Module, word: str, start: Any):
    """PEFT writes W0 − s B0 A0 into the base, Rankwise leaves W0 and subtracts the start."""
    base = One(copy.deepcopy(layer))
    with torch.no_grad():
        base.layer.weight.normal_()
    original, x = copy.deepcopy(base), torch.randn(5, 12)
    theirs, ours = with_peft(base, init_lora_weights=word), with_rankwise(base, init=start)

    def weight() -> Tensor:
        layer = theirs.base_model.model.layer
        return layer.base_layer.weight + layer.get_delta_weight("default")

    assert torch.equal(ours(x), original(x))  # bit for bit; PEFT's up to rounding
    assert relative(theirs(x), original(x)) < 1e-6
    assert relative(ours.layer.weight, weight()) < 1e-6
    for model in (ours, theirs):
        backward(model, x)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.optim.SGD(trained, lr=0.05).step()
    assert relative(ours.layer.weight, original.layer.weight) > 0.1
    assert relative(ours.layer.weight, weight()) < 2e-6
