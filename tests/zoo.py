"""A model with one of every kind of layer that can be adapted, for the contract's tests."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCABULARY, WIDTH = 24, 16


class Experts(nn.Module):
    """A mixture of experts as transformers stores it: the weights of all experts in one bank."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.is_transposed = turned
        up, down = (3, 12, WIDTH), (3, WIDTH, 12)
        self.up_proj = nn.Parameter(torch.randn(down if turned else up) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(up if turned else down) * 0.3)
        self.scale = nn.Parameter(torch.ones(WIDTH, 2) * 0.5)
        self.router = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(self.router(x), -1)
        form = ("...i,eio->...eo", "...eo,eoi->...ei") if self.is_transposed else (
            "...i,eoi->...eo", "...eo,eio->...ei",
        )  # fmt: skip
        inner = torch.tanh(torch.einsum(form[0], x, self.up_proj))
        outer = torch.einsum(form[1], inner, self.down_proj)
        return torch.einsum("...ei,...e->...i", outer, shares) * self.scale.sum(-1)


class Zoo(nn.Module):
    """Embedding, Conv1d with groups and padding, attention of both storages, a fused projection,
    transformers' Conv1D, a bank of experts, a strided Conv2d, norms, and a tied output layer.
    """

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.mix = nn.Conv1d(
            WIDTH, WIDTH, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"
        )
        self.packed = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(WIDTH, 2, kdim=12, vdim=10, batch_first=True)
        self.keys = nn.Linear(WIDTH, 12)
        self.values = nn.Linear(WIDTH, 10, bias=False)
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.turn = Conv1D(WIDTH, WIDTH)
        self.experts = Experts(turned)
        self.image = nn.Conv2d(1, 4, (3, 2), stride=2, padding=1)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 20, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.out.weight = self.tokens.weight
        with torch.no_grad():
            self.turn.weight.normal_(std=0.3)
            self.tokens.weight.normal_(std=0.7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + self.mix(x.mT).mT
        x = x + self.packed(x, x, x, need_weights=False)[0]
        x = x + self.apart(x, self.keys(x), self.values(x), need_weights=False)[0]
        query, key, value = self.fused(x).split(WIDTH, -1)
        x = x + torch.softmax(query @ key.mT / 4, -1) @ value
        x = x + self.turn(x) + self.experts(x)
        x = x + self.image(x[:, None]).mean((1, 2, 3))[:, None, None]
        return self.out(self.norm(self.encoder(x)))


EVERYTHING = (
    "tokens", "mix", "packed.q_proj", "packed.v_proj", "packed.out_proj", "apart.q_proj",
    "apart.k_proj", "apart.v_proj", "keys", "fused", "turn", "experts.up_proj",
    "experts.down_proj", "experts.scale", "image", "linear1", "linear2",
)  # fmt: skip
IDS = torch.randint(1, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(4))
