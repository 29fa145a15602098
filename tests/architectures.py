"""Architectures of transformers, built tiny with random weights, and what must be found in each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

WORDS = 32
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 0, **SMALL}
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {**TEXT, **ENDS, "num_key_value_heads": 1}
GEMMA: dict[str, Any] = {**LLAMA, "head_dim": 8}
IMAGE: dict[str, Any] = {**SMALL, "image_size": 8, "patch_size": 4}
DEBERTA_V3: dict[str, Any] = {
    **TEXT,
    "relative_attention": True,
    "position_buckets": 4,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "max_position_embeddings": 32,
    "type_vocab_size": 0,
}
T5: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
WHISPER: dict[str, Any] = {
    "vocab_size": WORDS,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "classifier_proj_size": 12,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
    **ENDS,
}
CLIP_TEXT: dict[str, Any] = {**TEXT, **ENDS, "max_position_embeddings": 16}
CLIP: dict[str, Any] = {"text_config": CLIP_TEXT, "vision_config": IMAGE, "projection_dim": 12}

NUMBERS = torch.Generator().manual_seed(9)
IDS = torch.randint(3, WORDS, (3, 7), generator=NUMBERS)
IMAGES = torch.randn(3, 3, 8, 8, generator=NUMBERS)
SOUND = torch.randn(3, 8, 16, generator=NUMBERS)
CLASSES = {"input_ids": IDS, "labels": torch.tensor([0, 1, 1])}
LANGUAGE = {"input_ids": IDS, "labels": IDS}


def spelled(*patterns: str) -> list[str]:
    """Each pattern with every choice of its braces: "a.{0,1}" means a.0 and a.1."""
    found: list[str] = []
    for pattern in patterns:
        parts = re.split(r"\{([^}]*)\}", pattern)
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        found.extend("".join(chosen) for chosen in product(*choices))
    return found


@dataclass(frozen=True)
class Architecture:
    """A tiny model and what must be found in it.

    Attributes:
        build: makes it, with random weights.
        batch: inputs, and labels for its own loss.
        head: names of its output layer.
        kind: of the head.
        default: the query and value projections.
        linear: what "all-linear" adds to those.
        outputs: the output that is compared.
    """

    build: Callable[[], Any]
    batch: dict[str, Any]
    head: tuple[str, ...]
    kind: str
    default: list[str]
    linear: list[str] = field(default_factory=list[str])
    outputs: str = "logits"

    def fresh(self) -> Any:
        torch.manual_seed(6)
        return self.build().eval()

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            inputs = {k: v for k, v in self.batch.items() if k not in ("labels", "return_loss")}
            return getattr(model(**inputs), self.outputs)


LLAMA_DEFAULT = spelled("model.layers.{0,1}.self_attn.{q_proj,v_proj}")
LLAMA_LINEAR = spelled(
    "model.layers.{0,1}.self_attn.{k_proj,o_proj}",
    "model.layers.{0,1}.mlp.{gate_proj,up_proj,down_proj}",
)
ARCHITECTURES = {
    "bert": Architecture(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
        CLASSES,
        ("classifier",),
        "classification",
        spelled("bert.encoder.layer.{0,1}.attention.self.{query,value}"),
        spelled(
            "bert.encoder.layer.{0,1}.attention.{self.key,output.dense}",
            "bert.encoder.layer.{0,1}.{intermediate,output}.dense",
            "bert.pooler.dense",
        ),
    ),
    "roberta": Architecture(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
        CLASSES,
        ("classifier",),
        "classification",
        spelled("roberta.encoder.layer.{0,1}.attention.self.{query,value}"),
        spelled(
            "roberta.encoder.layer.{0,1}.attention.{self.key,output.dense}",
            "roberta.encoder.layer.{0,1}.{intermediate,output}.dense",
        ),
    ),
    "deberta-v3": Architecture(
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**DEBERTA_V3)),
        CLASSES,
        ("pooler", "classifier"),
        "classification",
        spelled("deberta.encoder.layer.{0,1}.attention.self.{query_proj,value_proj}"),
        spelled(
            "deberta.encoder.layer.{0,1}.attention.{self.key_proj,output.dense}",
            "deberta.encoder.layer.{0,1}.{intermediate,output}.dense",
        ),
    ),
    "gpt2": Architecture(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, **ENDS)
        ),
        LANGUAGE,
        ("lm_head",),
        "language-model",
        spelled("transformer.h.{0,1}.attn.c_attn"),
        spelled("transformer.h.{0,1}.{attn.c_proj,mlp.c_fc,mlp.c_proj}"),
    ),
    "t5": Architecture(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        {**LANGUAGE, "decoder_input_ids": IDS},
        ("lm_head",),
        "language-model",
        spelled(
            "{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{q,v}",
            "decoder.block.{0,1}.layer.1.EncDecAttention.{q,v}",
        ),
        spelled(
            "{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{k,o}",
            "decoder.block.{0,1}.layer.1.EncDecAttention.{k,o}",
            "encoder.block.{0,1}.layer.1.DenseReluDense.{wi,wo}",
            "decoder.block.{0,1}.layer.2.DenseReluDense.{wi,wo}",
        ),
    ),
    "llama": Architecture(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
        LANGUAGE,
        ("lm_head",),
        "language-model",
        LLAMA_DEFAULT,
        LLAMA_LINEAR,
    ),
    "qwen3": Architecture(
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GEMMA, tie_word_embeddings=True)),
        LANGUAGE,
        ("lm_head",),
        "language-model",
        LLAMA_DEFAULT,
        LLAMA_LINEAR,
    ),
    "gemma2": Architecture(
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)),
        LANGUAGE,
        ("lm_head",),
        "language-model",
        LLAMA_DEFAULT,
        LLAMA_LINEAR,
    ),
    "gemma3": Architecture(
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA)),
        LANGUAGE,
        ("lm_head",),
        "language-model",
        LLAMA_DEFAULT,
        LLAMA_LINEAR,
    ),
    "mixtral": Architecture(
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2)
        ),
        LANGUAGE,
        ("lm_head",),
        "language-model",
        LLAMA_DEFAULT,
        spelled("model.layers.{0,1}.self_attn.{k_proj,o_proj}"),
    ),
    "vit": Architecture(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)),
        {"pixel_values": IMAGES, "labels": CLASSES["labels"]},
        ("classifier",),
        "classification",
        spelled("vit.layers.{0,1}.attention.{q_proj,v_proj}"),
        spelled("vit.layers.{0,1}.{attention.k_proj,attention.o_proj,mlp.fc1,mlp.fc2}"),
    ),
    "whisper": Architecture(
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        {"input_features": SOUND, "decoder_input_ids": IDS, "labels": IDS},
        ("proj_out",),
        "language-model",
        spelled(
            "model.{encoder,decoder}.layers.{0,1}.self_attn.{q_proj,v_proj}",
            "model.decoder.layers.{0,1}.encoder_attn.{q_proj,v_proj}",
        ),
        spelled(
            "model.{encoder,decoder}.layers.{0,1}.{self_attn.k_proj,self_attn.out_proj,fc1,fc2}",
            "model.decoder.layers.{0,1}.encoder_attn.{k_proj,out_proj}",
        ),
    ),
    "clip": Architecture(
        lambda: hf.CLIPModel(hf.CLIPConfig(**CLIP)),
        {"input_ids": IDS, "pixel_values": IMAGES, "return_loss": True},
        (),
        "none",
        spelled("{text_model,vision_model}.encoder.layers.{0,1}.self_attn.{q_proj,v_proj}"),
        spelled(
            "{text_model,vision_model}.encoder.layers.{0,1}.self_attn.{k_proj,out_proj}",
            "{text_model,vision_model}.encoder.layers.{0,1}.mlp.{fc1,fc2}",
            "visual_projection",
            "text_projection",
        ),
        "logits_per_text",
    ),
}
