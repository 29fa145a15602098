"""What is written: the words of the configuration, and what cannot be said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from peft_models import Convolutions, Flat, Heads, Mixture, Twins, biased, gpt2, lora, make, tied
from rankwise.errors import UserError
from rankwise.inits import PiSSA
from rankwise.io.base import base_of
from rankwise.io.peft_write import Content, content
from rankwise.methods.adapter import Adapter, Tokens, adapter_of


def written(build: Callable[[], nn.Module], method: rw.LoRA) -> Content:
    rw.attach(model := make(build), method)
    adapter = adapter_of(model)
    return content(adapter, base_of(model, adapter))


QKV = {"c_attn": rw.Split(("q_proj", "k_proj", "v_proj"))}
PREFIX = "base_model.model."


def test_a_plain_adapter_needs_no_notes():
    found = written(Flat, lora("up"))
    assert found.notes.to_json() is None
    assert found.config["peft_type"] == "LORA"
    assert not {"target_parameters", "lora_bias", "ensure_weight_tying"} & found.config.keys()


WORDS: dict[str, tuple[Callable[[], nn.Module], rw.LoRA, dict[str, Any]]] = {
    "a group has the rank of all groups": (
        Convolutions,
        lora("two", r=3, alpha=6),
        {"r": 6, "lora_alpha": 12, "target_modules": ["two"]},
    ),
    "a start doubles the rank": (Flat, lora("up", init=PiSSA()), {"r": 6, "lora_alpha": 10}),
    "a stabilized one keeps its scale": (
        Flat,
        lora("up", init=PiSSA(), rank_stabilized=True, r=2, alpha=3),
        {"r": 4, "lora_alpha": pytest.approx(3 * 2**0.5), "use_rslora": True},
    ),
    "an attention is named as a whole": (
        Heads,
        lora("first.q_proj", "first.k_proj", r=2, alpha=2),
        {"target_modules": ["first"], "r": 4, "lora_alpha": 4},
    ),
    "parts are named by their projection": (
        gpt2,
        lora("0.attn.c_attn.q_proj", split=QKV),
        {"target_modules": ["0.attn.c_attn"], "fan_in_fan_out": True},
    ),
    "parameters have a list of their own": (
        Mixture,
        lora("0.experts.up", "router"),
        {"target_modules": [], "target_parameters": ["0.experts.up", "router.weight"]},
    ),
    "dora": (Flat, lora("up", dora=True), {"use_dora": True}),
    "biases of the adapted": (biased, lora("q_proj", bias="adapted"), {"bias": "lora_only"}),
    "biases of all": (biased, lora("q_proj", bias="all"), {"bias": "all"}),
    "rows": (
        Flat,
        lora("up", trainable_tokens={"embed": [3, 1]}),
        {"trainable_token_indices": {"embed": [3, 1]}},
    ),
    "tied": (
        tied,
        lora("lm_head", tied=True),
        {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]},
    ),
    "beyond PEFT": (Heads, lora("first.q_proj", dora=True), {"peft_type": "RANKWISE_LORA"}),
}


@pytest.mark.parametrize("case", WORDS)
def test_the_words_of_the_configuration(case: str):
    build, method, words = WORDS[case]
    config = written(build, method).config
    assert {key: config.get(key) for key in words} == words


def test_a_tie_that_peft_does_not_know_is_two_targets():
    config = written(Twins, lora("embed", "a", tied=True)).config
    assert config["target_modules"] == ["a", "b", "embed", "out"]
    assert "ensure_weight_tying" not in config


def with_biases(adapter: Adapter, **biases: torch.Tensor) -> Adapter:
    return Adapter(adapter.method, adapter.factors, biases=biases)


def test_a_bias_that_the_base_has_not_is_one_of_b():
    rw.attach(model := make(Flat), lora("up", "down", alpha=6))
    plain = adapter_of(model)
    gained = torch.randn(16)
    adapter = with_biases(plain, **{"down.bias": gained})
    found = content(adapter, base_of(model, adapter))
    assert (found.config["lora_bias"], found.config["bias"]) == (True, "none")
    torch.testing.assert_close(
        2 * found.tensors[f"{PREFIX}down.lora_B.bias"], gained.double(), rtol=1e-12, atol=0
    )
    assert not found.tensors[f"{PREFIX}up.lora_B.bias"].any()


def test_a_bias_that_no_layer_of_peft_has_is_beyond_it():
    rw.attach(model := make(Flat), lora("up", "embed"))
    adapter = with_biases(adapter_of(model), **{"embed.bias": torch.ones(16)})
    found = content(adapter, base_of(model, adapter))
    assert found.config["peft_type"] == "RANKWISE_LORA"


def test_what_contradicts_itself_is_not_written():
    rw.attach(model := make(Flat), lora("up"))
    plain = adapter_of(model)
    wrong = Adapter(lora("up", alpha=1), {**plain.factors, "nowhere": plain.factors["up"]})
    with pytest.raises(
        UserError, match=r"(?s)scale 1\.66667, and its method says 3.*'nowhere' is no"
    ):
        content(wrong, base_of(model, wrong))
    rows = Adapter(plain.method, plain.factors, tokens={"embd": Tokens((1,), torch.ones(1, 16))})
    with pytest.raises(UserError, match=r"no embedding 'embd'.*Did you mean 'embed'"):
        content(rows, base_of(model, rows))


class Inside(nn.Module):
    """A parameter whose full name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.ParameterDict({"w": nn.Parameter(torch.ones(2, 3, 4))})
        self.deep = nn.ModuleDict(
            {"bank": nn.ParameterDict({"w": nn.Parameter(torch.ones(2, 3, 4))})}
        )


def test_parameters_that_peft_cannot_tell_apart_are_refused():
    model = Inside()
    rw.attach(model, rw.LoRA(r=1, target_modules=["^bank.w$"], head="freeze"))
    adapter = adapter_of(model)
    with pytest.raises(UserError, match=r"an adapted parameter .*'bank\.w'.* is the end of"):
        content(adapter, base_of(model, adapter))
    rw.detach(model)
    rw.attach(model, rw.LoRA(r=1, target_modules=["deep.bank.w"], head="freeze"))
    adapter = adapter_of(model)
    found = content(adapter, base_of(model, adapter))
    assert found.config["target_parameters"] == ["deep.bank.w"]
