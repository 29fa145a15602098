"""Small models with one layer of each kind that can be adapted, for the table of capabilities."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw

__all__ = ["ROWS", "Model", "Row", "an_input", "new_base"]


class Model(nn.Module):
    """One layer that is adapted, and for ties a second one that holds the same weight."""

    def __init__(self, layer: nn.Module, twin: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.twin = layer, twin

    def forward(self, x: Tensor) -> Tensor:
        y = _run(self.layer, x)
        if self.twin is None:
            return y
        return y + _run(self.twin, x) if x.is_floating_point() else self.twin(y)


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.MultiheadAttention):
        return layer(x, x, x, need_weights=False)[0]
    return layer(x)


class Reader(nn.Module):
    """A module that reads its own parameter: one matrix (out, in), or a bank of such."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix.mT)


@dataclass(frozen=True)
class Row:
    """One kind of layer.

    Attributes:
        make: the layer as it is before quantisation, a new one each time.
        shape: of an input; empty for ids.
        target: what is adapted.
        weight: the parameter that holds it.
        options: of LoRA that naming the target takes.
        packed: makes the quantised layer of the plain one.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (5, 16)
    target: str = "layer"
    weight: str = "layer.weight"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    packed: Callable[[nn.Module], nn.Module] | None = None


def _conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(12, 16)
    nn.init.normal_(layer.weight, std=0.3)
    return layer


def _four_bits(plain: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(plain.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    layer.bias = plain.bias
    layer.support_avx512bf16_for_cpu = False  # whose kernel rounds the base, not what is adapted
    return layer.to("cpu")


def _eight_bits(plain: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.weight = Int8Params(plain.weight.detach().clone(), requires_grad=False)
    layer.bias = plain.bias
    return layer.to("cpu")


def _torchao(plain: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(plain)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0]


def _attention() -> nn.Module:
    return nn.MultiheadAttention(16, 2, batch_first=True)


FUSED = {"layer": rw.Split(("query", "key", "value"))}
WIDE = (6, 64)
ROWS: dict[str, Row] = {
    "Linear": Row(lambda: nn.Linear(16, 12)),
    "Embedding": Row(lambda: nn.Embedding(24, 12), ()),
    "Conv1D of transformers": Row(_conv1d_of_transformers),
    "Conv1d": Row(lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 8)),
    "Conv2d": Row(lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), stride=2), (2, 4, 8, 7)),
    "Conv3d": Row(
        lambda: nn.Conv3d(2, 6, 2, padding=1, padding_mode="circular"), (2, 2, 4, 4, 4)
    ),
    "Conv2d in groups": Row(lambda: nn.Conv2d(8, 6, 3, groups=2, padding=1), (2, 8, 6, 6)),
    "part of MultiheadAttention": Row(
        _attention, (2, 5, 16), "layer.v_proj", "layer.in_proj_weight"
    ),
    "out_proj of MultiheadAttention": Row(
        _attention, (2, 5, 16), "layer.out_proj", "layer.out_proj.weight"
    ),
    "part of a fused Linear": Row(
        lambda: nn.Linear(16, 36), target="layer.value", options={"split": FUSED}
    ),
    "bare 2-D parameter": Row(
        lambda: Reader(12, 16), target="layer.matrix", weight="layer.matrix"
    ),
    "bank of experts": Row(
        lambda: Reader(3, 12, 16), (3, 5, 16), target="layer.matrix", weight="layer.matrix"
    ),
    "bitsandbytes 4-bit": Row(lambda: nn.Linear(64, 32), WIDE, packed=_four_bits),
    "bitsandbytes 8-bit": Row(lambda: nn.Linear(64, 32), WIDE, packed=_eight_bits),
    "torchao int8, weight only": Row(lambda: nn.Linear(64, 32), WIDE, packed=_torchao),
}  # fmt: skip


def new_base(row: Row, *, tied: bool = False) -> Model:
    """A new model of this row, always the same numbers."""
    torch.manual_seed(3)
    layer = row.make()
    packed = layer if row.packed is None else row.packed(layer)
    model = Model(packed, _twin(row, packed) if tied else None)
    return model.requires_grad_(False).eval()


def _twin(row: Row, layer: nn.Module) -> nn.Module:
    """A second layer that holds the weight of the first; of an embedding the output layer."""
    if isinstance(layer, nn.Embedding):
        twin: nn.Module = nn.Linear(layer.embedding_dim, layer.num_embeddings, bias=False)
    else:
        twin = copy.deepcopy(layer)
    owner, _, name = row.weight.removeprefix("layer.").rpartition(".")
    twin.get_submodule(owner).register_parameter(
        name, layer.get_submodule(owner).get_parameter(name)
    )
    return twin


def an_input(row: Row, seed: int = 5) -> Tensor:
    """An input for a model of this row."""
    generator = torch.Generator().manual_seed(seed)
    if not row.shape:
        return torch.randint(0, 24, (2, 12), generator=generator)
    return torch.randn(row.shape, generator=generator)
