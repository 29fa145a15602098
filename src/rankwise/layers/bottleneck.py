"""A small network behind a frozen layer: y' = y + U σ(D y + d) + u."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.inits import Kaiming
from rankwise.layers.layout import layout_of
from rankwise.layers.spec import Switch
from rankwise.layers.update import Update, wide_dtype

if TYPE_CHECKING:
    from rankwise.layers.layer import LoRALayer

__all__ = ["Activation", "Network", "network"]


class Activation(Enum):
    """σ, the function between the two matrices of a bottleneck; it is called as one."""

    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    TANH = "tanh"

    def __call__(self, x: Tensor) -> Tensor:
        """σ of every number."""
        return _FUNCTIONS[self](x)


_FUNCTIONS = {
    Activation.RELU: F.relu,
    Activation.GELU: F.gelu,
    Activation.SILU: F.silu,
    Activation.TANH: torch.tanh,
}


class Network(Update):
    """y' = y + U σ(D y + d) + u, where y is what the layer and the updates before this one give.

    ``down`` D (m, out), ``down_bias`` d (m,), ``up`` U (out, m) and ``up_bias`` u (out,) are
    parameters, in float32 (float64 on a float64 base) whatever the frozen layer's dtype. U, d and u
    start at zero, so step 0 is the base bit for bit.

    Source: Houlsby et al. 2019, arXiv 1902.00751, section 2.1; docs/math.md (20).
    """

    barrier = "is a small network with a nonlinearity inside, which no weight of the layer can hold"

    def __init__(self, down: Tensor, activation: Activation, switch: Switch) -> None:
        super().__init__()
        size, out = down.shape
        self.switch = switch
        self.activation = activation
        self.down = nn.Parameter(down)
        self.down_bias = nn.Parameter(down.new_zeros(size))
        self.up = nn.Parameter(down.new_zeros(out, size))
        self.up_bias = nn.Parameter(down.new_zeros(out))

    def add(self, y: Tensor, x: Tensor, plain: Tensor, layer: LoRALayer) -> Tensor:
        narrow = F.linear(y, self.down.to(y.dtype), self.down_bias.to(y.dtype))
        inner = self.activation(narrow)
        wide = F.linear(inner, self.up.to(inner.dtype), self.up_bias.to(inner.dtype))
        return y + wide.to(y.dtype)

    def extra_repr(self) -> str:
        size, out = self.down.shape
        return f"size={size}, width={out}, activation={self.activation.value}"


def network(layer: LoRALayer, size: int, activation: Activation, switch: Switch) -> Network:
    """The network behind a linear layer: D Kaiming-uniform, everything else zero."""
    like = layer.stored_weight("weight")
    out = layout_of(layer.base_layer).out_features
    down = torch.zeros(size, out, dtype=wide_dtype(like), device=like.device)
    Kaiming().draw(down)
    return Network(down, activation, switch)
