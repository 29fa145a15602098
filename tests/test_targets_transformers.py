"""Heads, default targets and all-linear on the architectures of transformers, built tiny."""

from typing import Any

import pytest
import transformers as hf
from torch import nn

from rankwise.methods.lora import default_targets
from rankwise.targets import find_head, select, shared_weights

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
WORDS: dict[str, Any] = {"vocab_size": 32}
LLAMA: dict[str, Any] = {"num_key_value_heads": 2, **WORDS, **SMALL}
GPT2: dict[str, Any] = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    **WORDS,
}
DISTIL: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, **WORDS}
T5: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    **WORDS,
}
VIT: dict[str, Any] = {"image_size": 8, "patch_size": 4, **SMALL}


def build(name: str) -> nn.Module:
    """A model with random weights; nothing is downloaded."""
    return {
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**WORDS, **SMALL)),
        "bert-body": lambda: hf.BertModel(hf.BertConfig(**WORDS, **SMALL)),
        "bert-lm": lambda: hf.BertForMaskedLM(hf.BertConfig(**WORDS, **SMALL)),
        "bert-spans": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**WORDS, **SMALL)),
        "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**WORDS, **SMALL)),
        "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        "gpt2-class": lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
        "llama-tied": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(tie_word_embeddings=True, **LLAMA)
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    }[name]()


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("bert", ("classifier",), "classification"),
        ("bert-body", (), "none"),
        ("bert-lm", ("cls.predictions.decoder",), "language-model"),
        ("bert-spans", ("qa_outputs",), "classification"),
        ("roberta", ("classifier",), "classification"),
        ("distilbert", ("pre_classifier", "classifier"), "classification"),
        ("gpt2", ("lm_head",), "language-model"),
        ("gpt2-class", ("score",), "classification"),
        ("llama", ("lm_head",), "language-model"),
        ("t5", ("lm_head",), "language-model"),
        ("vit", ("classifier",), "classification"),
    ],
)
def test_the_head_is_found(name: str, head: tuple[str, ...], kind: str):
    found = find_head(build(name))
    assert (found.names, found.kind) == (head, kind)


@pytest.mark.parametrize(
    ("name", "targets", "number"),
    [
        ("bert", {"query", "value"}, 4),
        ("roberta", {"query", "value"}, 4),
        ("distilbert", {"q_lin", "v_lin"}, 4),
        ("gpt2", {"c_attn"}, 2),
        ("llama", {"q_proj", "v_proj"}, 4),
        ("t5", {"q", "v"}, 12),  # self-attention of both halves, and cross-attention
        ("vit", {"q_proj", "v_proj"}, 4),
    ],
)
def test_query_and_value_are_found(name: str, targets: set[str], number: int):
    model = build(name)
    chosen = [site.name for site in select(model, default_targets(model))]
    assert {n.rpartition(".")[2] for n in chosen} == targets
    assert len(chosen) == number


@pytest.mark.parametrize(
    ("name", "ends", "number"),
    [
        ("bert", {"query", "key", "value", "dense"}, 13),
        ("roberta", {"query", "key", "value", "dense"}, 12),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}, 8),
        ("llama", {*"qkvo", "gate", "up", "down"}, 14),
        ("vit", {*"qkvo", "fc1", "fc2"}, 12),
    ],
)
def test_all_linear_leaves_the_head(name: str, ends: set[str], number: int):
    model = build(name)
    head = find_head(model)
    chosen = [site.name for site in select(model, ["all-linear"])]
    assert {n.rpartition(".")[2].removesuffix("_proj") for n in chosen} == {
        end.removesuffix("_proj") for end in ends
    }
    assert len(chosen) == number
    assert not any(head.holds(n) for n in chosen)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("bert", []),
        ("llama", []),
        ("llama-tied", [("model.embed_tokens.weight", "lm_head.weight")]),
        ("gpt2", [("transformer.wte.weight", "lm_head.weight")]),
    ],
)
def test_tied_embeddings_are_found(name: str, groups: list[tuple[str, ...]]):
    assert shared_weights(build(name)) == groups
