"""Layers with a forward of their own: those that are plain all the same, and those that are not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.layers import refusal


class Steered(nn.Linear):
    """A plain layer unless an attribute says otherwise."""

    factor = 1.0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return super().forward(input) * self.factor


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + (0.1 if self.training else 0.0)


def steered() -> nn.Module:
    layer = Steered(3, 3)
    layer.factor = 2.0
    return layer


def router() -> nn.Module:
    class Config:
        hidden_size, num_local_experts, num_experts_per_tok = 4, 3, 1

    return Llama4Router(Config())


def unequal() -> nn.Module:
    layer = Gemma3TextScaledWordEmbedding(9, 4, 0, 2.0)
    layer.also = 1  # which may steer what it does
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        FalconLinear(4, 3),
        FalconLinear(4, 3, bias=False),
        Steered(4, 3),
        Gemma3TextScaledWordEmbedding(9, 4, 0, 3.0),
        BartScaledWordEmbedding(9, 4, 0, 3.0),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_computes_a_plain_layer_can_be_adapted(layer: nn.Module) -> None:
    assert refusal(layer) is None


@pytest.mark.parametrize(
    "layer",
    [steered(), Noisy(3, 3), router(), unequal()],
    ids=lambda layer: type(layer).__name__,
)
def test_what_may_compute_more_is_refused(layer: nn.Module) -> None:
    assert "with a forward of its own" in str(refusal(layer))


def test_looking_draws_from_no_generator() -> None:
    class Fresh(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return (
                input @ self.weight.T + self.bias
                if self.bias is not None
                else input @ self.weight.T
            )

    before = torch.get_rng_state()
    with torch.device("meta"):
        assert refusal(Fresh(2, 2)) is None
    assert torch.equal(torch.get_rng_state(), before)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = Gemma3TextScaledWordEmbedding(9, 4, 0, 3.0)
        self.out = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.tokens(ids))


@pytest.mark.parametrize("dora", [False, True])
def test_peft_computes_the_same_for_a_scaled_embedding(dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, ids = Scaled(), torch.tensor([[1, 4, 7]])
    config = peft.LoraConfig(r=2, target_modules=["tokens"], use_dora=dora, init_lora_weights=False)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path)
    rw.load_adapter(base.eval(), tmp_path)
    with torch.no_grad():
        assert (theirs(ids) - Scaled.forward(base, ids)).abs().max() < 1e-5
        assert rw.merge(base, probe=ids).passed
        assert (theirs(ids) - base(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_rows_are_scaled_as_the_others_are(dtype: torch.dtype) -> None:
    model, ids = Scaled().to(dtype), torch.tensor([[1, 4, 7]])
    method = rw.LoRA(
        r=1, target_modules=["tokens"], trainable_tokens={"tokens": [4]}, head="freeze"
    )
    rw.attach(model, method)
    with torch.no_grad():
        for update in updates_of(model).values():
            for parameter in update.trained():
                parameter.normal_()
        dense = model.tokens.weight.double()
        wanted = 3.0 * dense[ids]
        torch.testing.assert_close(
            model.tokens(ids).double(),
            wanted,
            rtol=0.05 if dtype is torch.bfloat16 else 1e-6,
            atol=0.05,
        )
    assert rw.merge(model, probe=ids).passed
