"""Small models with trained-looking adapters, for every test of this folder."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise.attaching import lora_layers
from rankwise.layers import LoRAEmbedding


class Block(nn.Module):
    """Two linear layers with dropout and a residual: enough of an owner to merge inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.drop(torch.relu(self.up(x))))


class Net(nn.Module):
    """Ids (N, T) → class scores (N, 3)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width, padding_idx=0, scale_grad_by_freq=True)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Layers(nn.Module):
    """One layer of every kind that can be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=2)
        self.linear = nn.Linear(6, 9, bias=False)
        self.conv = Conv1D(5, 9)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.linear(self.embed(ids)))
        return self.attention(x, x, x, need_weights=False)[0]


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, num_labels=3)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, **TOKENS
        )
    ),
}


def train(model: nn.Module, size: float = 0.05) -> None:
    """Give every zero factor of an adapter numbers of its own, as training would."""
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        factor = layer.update.lora_A if isinstance(layer, LoRAEmbedding) else layer.update.lora_B
        fresh = torch.randn(factor.shape, generator=generator) * size
        factor.data.copy_(fresh)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 40, (5, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def net() -> Callable[..., Net]:
    """A builder of adapted nets: every layer but the head adapted, the head trained."""

    def build(dtype: torch.dtype = torch.float32, size: float = 0.05, **options: object) -> Net:
        model = Net().to(dtype)
        wanted = {"r": 3, "target_modules": ["embed", "up", "down"], "head": "train"}
        rankwise.attach(model, rankwise.LoRA(**{**wanted, **options}))
        train(model, size)
        return model.eval()

    return build


@pytest.fixture
def trained() -> Callable[..., None]:
    return train


@pytest.fixture
def layers() -> Callable[..., Layers]:
    """A builder of :class:`Layers` with each of its layers adapted."""
    targets = ["embed", "linear", "conv", "out_proj"]

    def build(dtype: torch.dtype = torch.float32) -> Layers:
        model = Layers().to(dtype)
        method = rankwise.LoRA(r=4, alpha=6.0, target_modules=targets, head="freeze")
        rankwise.attach(model, method)
        train(model, 0.3)
        return model.eval()

    return build


@pytest.fixture
def tiny() -> Callable[[str], nn.Module]:
    """A builder of small transformers models with random weights."""

    def build(kind: str) -> nn.Module:
        return MODELS[kind]().eval()

    return build
