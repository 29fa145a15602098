"""Every case of PEFT's file format, both ways: PEFT's logits here, and Rankwise's logits there."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from peft_models import (
    Convolutions,
    Flat,
    Heads,
    Mixture,
    Twins,
    bert,
    biased,
    close,
    gpt2,
    gpt_oss,
    llama,
    logits,
    lora,
    make,
    mixtral,
    randomise,
    same,
    tied,
)
from rankwise.attaching import low_rank_updates
from rankwise.inits import OLoRA, PiSSA
from rankwise.io.adapters import load_adapter, save_adapter
from rankwise.methods.adapter import adapter_of

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".is_gradient_checkpointing. is deprecated",
        "Setting .save_embedding_layers. to .True.",
        "Could not identify embedding layer",
        "LoRA adapter added to ConvNd layer with groups",
        "fan_in_fan_out is set to",
        "The following (rank|alpha)_pattern keys did not match",
        "Model has .tie_word_embeddings=True. and a tied layer is part",
        ".lora_bias=True. was passed but the targeted layer",
        "Adapter .default.. . LoRA tensor.s. have",
    )
]


THEIRS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "convolutions": (lambda: Convolutions(1), {"target_modules": ["one", "two", "three"]}),
    "dora, convolutions": (
        lambda: Convolutions(1),
        {"target_modules": ["one", "two", "three", "head"], "use_dora": True},
    ),
    "attention": (Heads, {"target_modules": ["first", "head"]}),
    "attention, patterns": (
        Heads,
        {
            "target_modules": ["first", "second"],
            "rank_pattern": {"second": 2},
            "alpha_pattern": {"first": 3},
        },
    ),
    "attention, biases": (Heads, {"target_modules": ["first", "head"], "bias": "lora_only"}),
    "parameters": (
        Mixture,
        {"target_modules": [], "target_parameters": ["experts.up", "0.experts.down", "flat"]},
    ),
    "a parameter called weight": (
        Mixture,
        {"target_modules": ["inner"], "target_parameters": ["router.weight", "up"]},
    ),
    "parameters, turned": (
        lambda: Mixture(True),
        {"target_modules": [], "target_parameters": ["up", "down"], "rank_pattern": {"up": 2}},
    ),
    "experts of mixtral": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "down_proj"]},
    ),
    "experts of gpt-oss, which are turned": (
        gpt_oss,
        {"target_modules": [], "target_parameters": ["gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "parameters and a layer inside": (
        Mixture,
        {"target_modules": ["head"], "target_parameters": ["up", "down"], "bias": "all"},
    ),
    "weights named as parameters": (
        Flat,
        {"target_modules": [], "target_parameters": ["up.weight", "head.weight"]},
    ),
    "turned weights named as parameters": (
        gpt2,
        {
            "target_modules": [],
            "target_parameters": ["attn.c_attn.weight"],
            "task_type": "CAUSAL_LM",
        },
    ),
    "dora": (Flat, {"target_modules": ["up", "down", "head"], "use_dora": True}),
    "dora, embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "dora, conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "bias of B": (Flat, {"target_modules": ["up", "down"], "lora_bias": True}),
    "bias of B, of convolutions": (
        lambda: Convolutions(1),
        {"target_modules": ["one", "three"], "lora_bias": True},
    ),
    "bias of B and of the base": (
        Flat,
        {"target_modules": ["up", "head"], "lora_bias": True, "bias": "lora_only"},
    ),
    "biases of the adapted": (biased, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "biases of all": (bert, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "biases of all, norms": (Flat, {"target_modules": ["down"], "bias": "all"}),
    "tokens": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 1]}},
    ),
    "tokens, tied": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 39]}),
    "tokens, tied and named twice": (
        tied,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]},
        },
    ),
    "tokens of a plain model": (
        Flat,
        {"target_modules": ["up"], "trainable_token_indices": {"embed": [5, 0, 7]}},
    ),
    "tied": (tied, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied, from the output": (tied, {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "tied, trained whole": (
        tied,
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "not tied, though it could be": (tied, {"target_modules": ["embed_tokens", "q_proj"]}),
}


def their_folder(build: Callable[[], nn.Module], options: dict[str, Any], folder: Path) -> Tensor:
    """Write a folder with PEFT; gives the logits of the model it came from."""
    model = peft.get_peft_model(make(build), peft.LoraConfig(r=4, lora_alpha=6, **options))
    randomise(model)
    model.save_pretrained(folder)
    found = logits(model)
    assert (found - logits(make(build))).abs().max() > 1e-2
    return found


@pytest.mark.parametrize("case", THEIRS)
def test_rankwise_loads_what_peft_wrote(tmp_path: Path, case: str):
    build, options = THEIRS[case]
    wanted = their_folder(build, options, tmp_path)
    load_adapter(model := make(build), tmp_path)
    close(logits(model), wanted)


@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_wrote_comes_back_to_peft(tmp_path: Path, case: str):
    build, options = THEIRS[case]
    wanted = their_folder(build, options, tmp_path / "theirs")
    load_adapter(model := make(build), tmp_path / "theirs")
    folder = save_adapter(model, tmp_path / "ours")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["peft_type"] == "LORA"
    close(logits(peft.PeftModel.from_pretrained(make(build), folder)), wanted)


QKV = {"c_attn": rw.Split(("q_proj", "k_proj", "v_proj"))}
OURS: dict[str, tuple[Callable[[], nn.Module], rw.LoRA]] = {
    "convolutions": (Convolutions, lora("one", "two", "three")),
    "convolution, a group for each channel": (lambda: Convolutions(2), lora("two", r=1)),
    "convolutions, stabilized": (
        Convolutions,
        lora("one", "two", "head", rank_stabilized=True, rank_pattern={"two": 2}),
    ),
    "dora, convolutions": (lambda: Convolutions(1), lora("one", "two", "three", dora=True)),
    "attention": (Heads, lora("first.q_proj", "first.k_proj", "first.v_proj", "first.out_proj")),
    "attention, of unlike ranks": (
        Heads,
        lora(
            "first.q_proj",
            "first.v_proj",
            "second.k_proj",
            "second.out_proj",
            "head",
            rank_pattern={"first.v_proj": 1, "second.out_proj": 7},
            alpha_pattern={"first.v_proj": 0.7, "second.out_proj": 11},
        ),
    ),
    "attention, output alone": (Heads, lora("second.out_proj")),
    "attention, biases": (Heads, lora("first.v_proj", "first.out_proj", bias="adapted")),
    "attention, all biases": (Heads, lora("first.v_proj", bias="all")),
    "parts": (gpt2, lora("c_attn.q_proj", "c_attn.v_proj", split=QKV)),
    "parts, of unlike scales": (
        gpt2,
        lora(
            "0.attn.c_attn.k_proj",
            "1.attn.c_attn.v_proj",
            "1.attn.c_attn.q_proj",
            "c_fc",
            split=QKV,
            rank_pattern={"v_proj": 2},
            alpha_pattern={"v_proj": 1.3},
        ),
    ),
    "dora, parts": (gpt2, lora("c_attn.q_proj", "0.attn.c_attn.v_proj", split=QKV, dora=True)),
    "parts by heads": (
        Flat,
        lora("up.a", "up.c", split={"up": rw.Split(("a", "b", "c"), heads=2)}),
    ),
    "parameters": (Mixture, lora("up", "down", "0.experts.flat", rank_pattern={"down": 2})),
    "parameters, turned": (lambda: Mixture(True), lora("1.experts.up", "experts.inner", "down")),
    "a parameter called weight": (Mixture, lora("router", "0.experts.inner")),
    "experts of mixtral": (mixtral, lora("experts.gate_up_proj", "0.mlp.experts.down_proj")),
    "experts of gpt-oss": (gpt_oss, lora("experts.gate_up_proj", "experts.down_proj", "q_proj")),
    "parameters and biases": (Mixture, lora("up", "inner", "head", bias="all")),
    "parameters of one bank, stabilized": (Mixture, lora("down", rank_stabilized=True)),
    "dora": (Flat, lora("up", "down", "head", dora=True)),
    "dora, embedding and biases": (
        biased,
        lora("embed_tokens", "q_proj", dora=True, bias="adapted"),
    ),
    "biases of the adapted": (biased, lora("q_proj", "down_proj", bias="adapted")),
    "biases of all": (bert, lora("query", bias="all", head="train")),
    "tokens": (llama, lora("q_proj", trainable_tokens={"embed_tokens": [3, 1]})),
    "tokens, tied": (tied, lora("q_proj", trainable_tokens={"embed_tokens": [39, 5]})),
    "tokens of a plain model": (Flat, lora("up", trainable_tokens={"embed": [5, 0, 7]})),
    "tied": (tied, lora("embed_tokens", "q_proj", tied=True)),
    "tied, from the output": (tied, lora("lm_head", "q_proj", tied=True)),
    "tied without PEFT's knowledge": (Twins, lora("embed", "a", tied=True, alpha_pattern={"a": 2})),
    "pissa": (gpt2, lora("c_attn", "c_fc", init=PiSSA())),
    "olora, of unlike ranks": (
        llama,
        lora("q_proj", "v_proj", init=OLoRA(), rank_pattern={"v_proj": 2}),
    ),
    "pissa, convolutions": (Convolutions, lora("one", "two", init=PiSSA())),
    "pissa, attention": (Heads, lora("first.q_proj", "first.out_proj", init=PiSSA())),
    "pissa, parts": (gpt2, lora("c_attn.q_proj", "c_attn.k_proj", split=QKV, init=PiSSA())),
    "pissa, parameters": (Mixture, lora("up", "flat", init=PiSSA())),
    "pissa, dora": (Flat, lora("up", "down", init=PiSSA(), dora=True)),
    "pissa, tied": (tied, lora("lm_head", init=PiSSA(), tied=True)),
    "only B": (Flat, lora("up", "down", freeze_A=True, dropout=0.1)),
    "with room": (Flat, lora("up", "down", slot=8, alpha=6, rank_pattern={"up": 2})),
    "with a head": (Flat, lora("up", head="train", modules_to_save=["norm"], bias="all")),
}


@pytest.fixture(params=OURS)
def ours(request, tmp_path: Path):
    """A folder that Rankwise wrote, how to make its base, and the model that it came from."""
    build, method = OURS[request.param]
    rw.attach(model := make(build), method)
    randomise(model)
    for update in low_rank_updates(model).values() if method.slot else ():
        with torch.no_grad():  # what a slot has beyond the rank has no gradient and stays zero
            update.lora_A[update.spec.r :] = 0
            update.lora_B[:, update.spec.r :] = 0
    assert (logits(model) - logits(make(build))).abs().max() > 1e-2
    return save_adapter(model, tmp_path / "adapter"), build, model


def test_peft_loads_what_rankwise_wrote(ours):
    folder, build, model = ours
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        close(logits(peft.PeftModel.from_pretrained(make(build), folder)), logits(model))


def test_rankwise_reads_the_same_adapter(ours, tmp_path: Path):
    folder, build, model = ours
    load_adapter(again := make(build), folder)
    assert torch.equal(logits(again), logits(model))
    same(adapter_of(again), adapter_of(model))
    second = save_adapter(again, tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (second / name).read_bytes() == (folder / name).read_bytes()
