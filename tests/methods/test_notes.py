"""What all-linear leaves out is said; tied weights are in tests/contract/test_architectures.py."""

import pytest
import torch
from torch import Tensor, nn

from rankwise.methods.lora import LoRA


class Own(nn.Linear):
    """What it does with its weight cannot be known."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Mixture(nn.Module):
    """Two blocks of a layer that fits, one that does not, and a bank of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self._block() for _ in range(2))
        self.out = Own(4, 4)

    def _block(self) -> nn.Module:
        block = nn.Module()
        block.fits = nn.Linear(4, 4)
        block.own = Own(4, 4)
        block.experts = nn.Module()
        block.experts.up = nn.Parameter(torch.zeros(2, 4, 4))
        block.experts.wide = nn.Parameter(torch.zeros(4, 4))
        return block


def told(targets: str | list[str] = "all-linear", **options: object) -> list[str]:
    method = LoRA(r=1, target_modules=targets, head="freeze", **options)  # type: ignore[arg-type]
    return [note for note in method.plan(Mixture()).notes if "all-linear" in note]


def test_banks_and_layers_that_cannot_be_adapted_are_told_once_each():
    banks, layers = told()
    assert banks == (
        "'all-linear' leaves 2 bank(s) of weights frozen, the first being 'blocks.0.experts.up': "
        "they are no Linear layers. To adapt them as well, name them in target_modules: experts.up."
    )
    assert layers == (
        "'all-linear' leaves 2 Linear layer(s) frozen that cannot be adapted, the first being "
        "'blocks.0.own': Own is a Linear with a forward of its own."
    )


def test_what_was_asked_for_is_not_told():
    banks, layers = told(layers=[1])
    assert "1 bank(s)" in banks
    assert "1 Linear layer(s)" in layers
    assert "blocks.1.own" in layers
    assert told(exclude_modules=["experts", "own"]) == []
    (only,) = told(["all-linear", "experts.up"])
    assert "own" in only
    assert told(["fits"]) == []


@pytest.mark.parametrize("tied", [False, True])
def test_two_targets_of_one_weight_are_a_mistake_unless_they_stay_tied(tied: bool):
    model = nn.ModuleDict({"tokens": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)})
    model["out"].weight = model["tokens"].weight
    method = LoRA(r=1, target_modules=["tokens", "out"], head="freeze", tied=tied)
    if tied:
        assert method.plan(model).notes == ()
        return
    with pytest.raises(ValueError, match="'tokens' and 'out' share one weight"):
        method.plan(model)


def test_no_dropout_on_an_embedding_and_no_bias_anywhere_are_told():
    model = nn.ModuleDict({"tokens": nn.Embedding(6, 4), "plain": nn.Linear(4, 4, bias=False)})
    options = {"r": 1, "target_modules": ["tokens", "plain"], "head": "freeze"}
    (note,) = LoRA(**options, dropout=0.1).plan(model).notes  # type: ignore[arg-type]
    assert note.startswith("'tokens': the input of an Embedding is row numbers")
    assert LoRA(**options).plan(model).notes == ()  # type: ignore[arg-type]
    for bias in ("adapted", "all"):
        with pytest.raises(ValueError, match=f"bias='{bias}', but no .* has a bias"):
            LoRA(**options, bias=bias).plan(model)  # type: ignore[arg-type]
