"""Tiny models with BitFit, bottlenecks and prefixes, and what must train on them, by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import Method
from rankwise.layers import Activation
from rankwise.methods.bitfit import BitFit
from rankwise.methods.bottleneck import After, Bottleneck, Houlsby, Pfeiffer
from rankwise.methods.prefix import PrefixTuning

WORDS, WIDTH = 32, 16
SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,  # of a trained model's size, so that attention attends
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(3, WORDS, (4, 6), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0


def bert() -> nn.Module:
    config = hf.BertConfig(
        **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0
    )
    return hf.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(**SMALL, n_inner=24, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    return hf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=1))


BLOCK = {
    "attention.self.query": WIDTH, "attention.self.key": WIDTH, "attention.self.value": WIDTH,
    "attention.output.dense": WIDTH, "attention.output.LayerNorm": WIDTH,
    "intermediate.dense": 24, "output.dense": WIDTH, "output.LayerNorm": WIDTH,
}  # fmt: skip
OUTPUTS = [f"bert.encoder.layer.{i}.{p}" for i in (0, 1) for p in ("attention.output", "output")]
BERT_NORMS = ["bert.embeddings.LayerNorm", *(f"{name}.LayerNorm" for name in OUTPUTS)]
BERT_BIASES = {
    **{f"bert.encoder.layer.{i}.{name}": size for i in (0, 1) for name, size in BLOCK.items()},
    "bert.embeddings.LayerNorm": WIDTH,
    "bert.pooler.dense": WIDTH,
}
GPT2_BIASES = {
    "transformer.ln_f": WIDTH,
    **{
        f"transformer.h.{i}.{name}": size
        for i in (0, 1)
        for name, size in {
            "ln_1": WIDTH, "ln_2": WIDTH, "attn.c_attn": 3 * WIDTH, "attn.c_proj": WIDTH,
            "mlp.c_fc": 24, "mlp.c_proj": WIDTH,
        }.items()
    },
}  # fmt: skip


def offsets(sizes: dict[str, int], parameter: str = "bias") -> dict[str, int]:
    """Names and sizes of the trained vectors for these modules."""
    label = f"updates.default/{parameter}.offset"
    return {f"{name}.{label}": size for name, size in sizes.items()}


def networks(names: list[str], size: int) -> dict[str, int]:
    """Names and sizes of the parameters of bottlenecks behind these layers."""
    parts = {"down": size * WIDTH, "down_bias": size, "up": WIDTH * size, "up_bias": WIDTH}
    return {f"{n}.updates.default.{part}": c for n in names for part, c in parts.items()}


def prefixes(names: list[str], length: int, width: int) -> dict[str, int]:
    return {
        f"{n}.updates.default.{part}": length * width for n in names for part in ("keys", "values")
    }


def grown(names: list[str], length: int, width: int, hidden: int) -> dict[str, int]:
    shared = {
        "trunk.embedding": length * width,
        "trunk.inner.weight": hidden * width,
        "trunk.inner.bias": hidden,
    }
    own = {"outer.weight": 2 * width * hidden, "outer.bias": 2 * width}
    return {f"{names[0]}.updates.default.{key}": size for key, size in shared.items()} | {
        f"{n}.updates.default.{key}": size for n in names for key, size in own.items()
    }


@dataclass(frozen=True)
class Case:
    """A model, a method for it, and what that declares: trained parameters with their sizes."""

    build: Callable[[], nn.Module]
    method: Method
    trained: dict[str, int]
    whole: tuple[str, ...] = ()


BERT_ATTENTION = [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)]
BERT_OUTPUTS = [f"{name}.dense" for name in OUTPUTS]
GPT2_ATTENTION = [f"transformer.h.{i}.attn" for i in (0, 1)]
LLAMA_ATTENTION = [f"model.layers.{i}.self_attn" for i in (0, 1)]
LLAMA_OUTPUTS = [
    f"model.layers.{i}.{p}" for i in (0, 1) for p in ("self_attn.o_proj", "mlp.down_proj")
]
CASES = {
    "bitfit on bert": Case(bert, BitFit(), offsets(BERT_BIASES), ("classifier",)),
    "bitfit on bert with a frozen head": Case(bert, BitFit(head="freeze"), offsets(BERT_BIASES)),
    "bitfit on gpt2": Case(gpt2, BitFit(), offsets(GPT2_BIASES)),
    "bitfit beside a whole module": Case(
        bert,
        BitFit(modules_to_save=["pooler"]),
        offsets({n: s for n, s in BERT_BIASES.items() if "pooler" not in n}),
        ("classifier", "bert.pooler"),
    ),
    "houlsby on bert": Case(
        bert,
        Bottleneck(5),
        networks(BERT_OUTPUTS, 5)
        | offsets(dict.fromkeys(BERT_NORMS, WIDTH), "weight")
        | offsets(dict.fromkeys(BERT_NORMS, WIDTH)),
        ("classifier",),
    ),
    "pfeiffer on gpt2": Case(
        gpt2,
        Bottleneck(3, Pfeiffer(), Activation.RELU),
        networks([f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)], 3),
    ),
    "houlsby without norms on llama": Case(
        llama,
        Bottleneck(3, Houlsby(norms=False), Activation.TANH),
        networks(LLAMA_OUTPUTS, 3),
    ),
    "bottlenecks behind named layers": Case(
        bert,
        Bottleneck(4, After(["query", "intermediate.dense"], ["intermediate"], layers=[1])),
        networks(["bert.encoder.layer.1.attention.self.query"], 4),
        ("classifier",),
    ),
    "prefix on bert": Case(
        bert, PrefixTuning(3), prefixes(BERT_ATTENTION, 3, WIDTH), ("classifier",)
    ),
    "prefix on gpt2": Case(gpt2, PrefixTuning(3), prefixes(GPT2_ATTENTION, 3, WIDTH)),
    "prefix on llama, whose heads share keys": Case(
        llama, PrefixTuning(3), prefixes(LLAMA_ATTENTION, 3, WIDTH // 2)
    ),
    "grown prefix on bert": Case(
        bert, PrefixTuning(3, hidden=7), grown(BERT_ATTENTION, 3, WIDTH, 7), ("classifier",)
    ),
    "grown prefix on llama": Case(
        llama, PrefixTuning(2, hidden=7), grown(LLAMA_ATTENTION, 2, WIDTH // 2, 7)
    ),
}  # fmt: skip


def base(name: str, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return CASES[name].build()


def attached(name: str, seed: int = 9) -> Any:
    model = base(name)
    torch.manual_seed(seed)
    rw.attach(model, CASES[name].method)
    return model


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, steps: int = 3) -> None:
    """A few steps of torch's SGD, large enough to show."""
    optimizer = torch.optim.SGD(list(trained(model).values()), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(input_ids=IDS, attention_mask=MASK).logits - 1).square().mean().backward()
        optimizer.step()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in model.state_dict().items()}
