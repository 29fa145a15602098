"""What PEFT has no form for: it refuses the folder, and Rankwise reads the same adapter again."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from peft_models import (
    IDS,
    Convolutions,
    Flat,
    Heads,
    Mixture,
    Twins,
    lora,
    make,
    randomise,
    same,
)
from rankwise.inits import PiSSA
from rankwise.io.adapters import load_adapter, save_adapter
from rankwise.methods.adapter import adapter_of

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


class Apart(nn.Module):
    """An attention whose keys and values have sizes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.narrow = nn.Linear(16, 12)
        self.attention = nn.MultiheadAttention(16, 2, kdim=12, vdim=16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(self.attention(x, self.narrow(x), x, need_weights=False)[0])


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.first = nn.Linear(16, 16)
        self.second = self.first
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(self.embed(input_ids)))))


CASES = {
    "attention of other sizes": (
        Apart,
        lora("attention.q_proj", "attention.k_proj", "attention.out_proj", "narrow"),
    ),
    "attention of other sizes, pissa": (Apart, lora("k_proj", "v_proj", init=PiSSA())),
    "dora of an attention": (Heads, lora("first.v_proj", "first.out_proj", "head", dora=True)),
    "dora of a bank": (Mixture, lora("up", "down", "flat", "inner", dora=True, r=2)),
    "dora of a convolution with groups": (Convolutions, lora("one", "two", dora=True)),
    "a module in two places": (Twice, lora("first", "head")),
    "rows of a tied embedding": (Twins, lora("a", tied=True, trainable_tokens={"embed": [3, 30]})),
    "rows of an adapted embedding": (
        Flat,
        lora("up", "embed", trainable_tokens={"embed": [3, 30]}),
    ),
}


@pytest.fixture(params=CASES)
def beyond(request, tmp_path: Path):
    build, method = CASES[request.param]
    rw.attach(model := make(build), method)
    randomise(model)
    return save_adapter(model, tmp_path / "adapter"), build, model


def test_peft_refuses_the_folder_as_a_whole(beyond):
    folder, build, _ = beyond
    with pytest.raises((KeyError, ValueError), match="RANKWISE_LORA"):
        peft.PeftModel.from_pretrained(make(build), folder)


def test_rankwise_reads_the_same_adapter(beyond, tmp_path: Path):
    folder, build, model = beyond
    load_adapter(again := make(build), folder)
    assert torch.equal(again.eval()(IDS), model.eval()(IDS))
    same(adapter_of(again), adapter_of(model))
    second = save_adapter(again, tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (second / name).read_bytes() == (folder / name).read_bytes()
