"""Small models with one of each kind of weight, for the tests of PEFT's files, and comparisons."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import rankwise as rw
from rankwise.methods.adapter import Adapter

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[5, 7, 9, 11, 3], [30, 2, 39, 1, 8]])


class Convolutions(nn.Module):
    """One of each dimension; the second has groups."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.one = nn.Conv1d(12, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 6, (3, 2), stride=(1, 2), padding=1, groups=groups)
        self.three = nn.Conv3d(6, 4, (1, 1, 3), padding=(0, 0, 1), bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.one(self.embed(input_ids).mT).unsqueeze(2).expand(-1, -1, 4, -1)
        x = self.three(torch.tanh(self.two(x)).unsqueeze(2))
        return self.head(x.mean((2, 3, 4)))


class Heads(nn.Module):
    """Two attentions on top of each other, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.first = nn.MultiheadAttention(16, 2, batch_first=True)
        self.second = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.first(x, x, x, need_weights=False)[0]
        return self.head(x + self.second(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Two banks, a matrix, a bias and a layer; by the alphabet the second bank comes first."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.is_transposed = turned
        self.up = nn.Parameter(torch.randn((3, 16, 10) if turned else (3, 10, 16)))
        self.down = nn.Parameter(torch.randn((3, 10, 16) if turned else (3, 16, 10)))
        self.flat = nn.Parameter(torch.randn(16, 16))
        self.inner = nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up.mT, self.down.mT) if self.is_transposed else (self.up, self.down)
        y = torch.einsum("eoi,...i->...eo", up, self.inner(x))
        y = torch.einsum("eoi,...ei->...o", down, torch.tanh(y))
        return torch.tanh(y @ self.flat.T + self.bias)


class Router(nn.Module):
    """A matrix called weight in a module that is no Linear, as mixtures of experts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.weight.T)


class Mixture(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.router = Router()
        self.blocks = nn.ModuleList(nn.ModuleDict({"experts": Experts(turned)}) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block.get_submodule("experts")(x) * self.router(x)
        return self.head(x)


class Flat(nn.Module):
    """Linear layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.up = nn.Linear(16, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.norm(self.up(self.embed(input_ids))))))


class Twins(nn.Module):
    """An output layer that holds the embedding's weight, and two layers that share one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.out = nn.Linear(16, 40)
        self.out.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(self.embed(input_ids))))))


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=24, num_labels=3))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


def llama(**more: Any) -> nn.Module:
    config = LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, **more)
    return LlamaForCausalLM(config)


def mixtral() -> nn.Module:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(**SMALL, intermediate_size=24, **experts))


def gpt_oss() -> nn.Module:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    config = GptOssConfig(**SMALL, intermediate_size=24, head_dim=8, **experts, pad_token_id=0)
    return GptOssForCausalLM(config)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def biased() -> nn.Module:
    return llama(attention_bias=True, mlp_bias=True)


def make(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # so that every layer matters, and biases are not zero
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS)
    return found if isinstance(found, Tensor) else found.logits


def randomise(model: nn.Module) -> None:
    """Numbers of its own for everything that trains, added in place: ties and biases stay."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.2


def close(first: Tensor, second: Tensor) -> None:
    """The same up to float32: 1e-6 of the largest logit."""
    assert (first - second).abs().max() <= 2e-6 * max(1.0, second.abs().max().item())


def lora(*targets: str, **options: Any) -> rw.LoRA:
    return rw.LoRA(**{"r": 3, "alpha": 5, "head": "freeze", "target_modules": targets, **options})


def same(first: Adapter, second: Adapter) -> None:
    """Equal in every tensor, bit for bit, and in what the method asks of each name."""
    assert first.factors.keys() == second.factors.keys()
    for name, mine in first.factors.items():
        other = second.factors[name]
        assert first.method.spec(name).scale == mine.scale == other.scale
        for a, b in zip(
            (mine.A, mine.B, mine.A0, mine.B0), (other.A, other.B, other.A0, other.B0), strict=True
        ):
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
        one, two = first.method.spec(name), second.method.spec(name)
        assert replace(one, init=rw.Kaiming()) == replace(two, init=rw.Kaiming())
    assert set(first.modules) == set(second.modules)
    for mine, other in (
        (first.trained, second.trained),
        (first.magnitudes, second.magnitudes),
        (first.biases, second.biases),
        (
            {n: t.delta for n, t in first.tokens.items()},
            {n: t.delta for n, t in second.tokens.items()},
        ),
    ):
        assert mine.keys() == other.keys()
        assert all(torch.equal(t, other[n]) and t.dtype == other[n].dtype for n, t in mine.items())
    assert {n: t.ids for n, t in first.tokens.items()} == {
        n: t.ids for n, t in second.tokens.items()
    }
    for option in ("tied", "bias", "freeze_A", "dora", "dropout", "slot", "rank_stabilized"):
        assert getattr(first.method, option) == getattr(second.method, option)
