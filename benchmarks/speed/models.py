"""The models that are timed: MiniLM as it comes, and Llama-shaped ones with random weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

import rankwise as rw

__all__ = ["LINEAR", "batch_of", "floor", "llama", "minilm", "ours", "theirs", "twin"]

LINEAR = {
    "bert": {
        "query and value": ["query", "value"],
        "all linear": ["query", "key", "value", "dense"],
    },
    "llama": {
        "query and value": ["q_proj", "v_proj"],
        "all linear": [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")],
    },
}


def minilm(dtype: torch.dtype) -> nn.Module:
    """all-MiniLM-L6-v2 with a classifier of two classes, as `rankwise demo` finds it."""
    from transformers import AutoModelForSequenceClassification

    from rankwise.lab.demo import model_folder

    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)
    return model.to(dtype).requires_grad_(False)


def llama(layers: int, width: int, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A Llama of TinyLlama's proportions with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 512),
        vocab_size=32_000,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def batch_of(
    rows: int, length: int, vocabulary: int, classes: int | None
) -> dict[str, torch.Tensor]:
    """Random tokens with the spread of lengths of short sentences, padded to the longest.

    Without classes every token is a target, but for the padding.
    """
    draw = random.Random(0)
    lengths = [length, *(draw.randint(max(3, length // 6), length) for _ in range(rows - 1))]
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, length), generator=made)
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    texts = ids.masked_fill(~mask, -100)
    labels = texts if classes is None else torch.randint(0, classes, (rows,), generator=made)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def twin(base: nn.Module) -> nn.Module:
    """A copy of a model's modules on the same parameters and buffers."""
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


def ours(
    base: nn.Module,
    targets: list[str],
    r: int = 8,
    dropout: float = 0.0,
    like: Callable[[nn.Module], nn.Module] = copy.deepcopy,
) -> nn.Module:
    """A copy of the base with Rankwise's updates."""
    model = like(base).train()
    torch.manual_seed(1)
    skip = [n for n, _ in model.named_modules() if n.endswith("pooler.dense")]
    names = {"target_modules": targets, "exclude_modules": skip}
    rw.attach(model, rw.LoRA(r, 2 * r, dropout=dropout, head="freeze", **names))
    return model


def theirs(
    base: nn.Module,
    targets: list[str],
    r: int = 8,
    dropout: float = 0.0,
    like: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    **more: Any,
) -> nn.Module:
    """A copy of the base with PEFT's updates, the same numbers in them as in :func:`ours`."""
    pooled = any(n.endswith("pooler.dense") for n, _ in base.named_modules())
    skip = r".*pooler\.dense" if pooled else None
    names = {"target_modules": targets, "exclude_modules": skip}
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, **names)
    model: Any = peft.get_peft_model(like(base), config, **more).train()
    state = {n: p for n, p in ours(base, targets, r, like=like).named_parameters() if "lora_" in n}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            part = "lora_A" if "lora_A" in name else "lora_B"
            module = name.removeprefix("base_model.model.").split(f".{part}")[0]
            parameter.data.copy_(state[f"{module}.updates.default.{part}"])
    return model


def floor(
    base: nn.Module, first: str, like: Callable[[nn.Module], nn.Module] = copy.deepcopy
) -> nn.Module:
    """A copy of the base with nothing that trains; gradients flow down to the module ``first``."""
    model = like(base).train()
    model.get_submodule(first).register_forward_hook(lambda _m, _a, made: made.requires_grad_())
    return model
