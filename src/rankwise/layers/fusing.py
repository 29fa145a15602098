"""Which frozen linear layers the fast paths of kernels may compute, and packing them."""

from __future__ import annotations

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rankwise.kernels import Frozen, PackedLinear, PlainLinear, can_pack
from rankwise.layers.layout import is_conv1d

__all__ = ["frozen_linear", "is_packed", "pack", "unpack"]

_STORED = (nn.Linear, NonDynamicallyQuantizableLinear)  # with the weight as (out, in)
_DENSE = (nn.Parameter, FakeTensor)  # the second in a rehearsal, where tensors have no numbers


def frozen_linear(module: nn.Module) -> Frozen | None:
    """A plain frozen linear layer for the fast paths; None where calling the module does more.

    That is the case for quantised layers, subclasses, layers with hooks or with a forward of their
    own (as accelerate gives them), and where the weight or the bias trains.
    """
    inside = vars(module)
    parameters = inside["_parameters"]
    weight, bias, own = parameters.get("weight"), parameters.get("bias"), inside.get("forward")
    stored = type(module) in _STORED
    if (
        not (stored or is_conv1d(module))
        or type(weight) not in _DENSE
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or not (own is None or type(own) is PackedLinear)
        or inside["_forward_hooks"]
        or inside["_forward_pre_hooks"]
        or inside["_backward_hooks"]
        or inside["_backward_pre_hooks"]
    ):
        return None
    return own or PlainLinear(weight if stored else weight.T, bias)


def pack(module: nn.Module, rows: int) -> PackedLinear | None:
    """Let a frozen linear layer compute with its weight packed for so many rows; None if it can't.

    The packed layer stands as the module's ``forward``; its class, parameters and state dict stay
    as they are.
    """
    plain = frozen_linear(module)
    if not isinstance(plain, PlainLinear) or not can_pack(plain.weight):
        return None
    packed = PackedLinear(module, rows, turned=type(module) not in _STORED)
    module.forward = packed
    return packed


def unpack(module: nn.Module) -> bool:
    """The inverse of :func:`pack`; whether the module was packed."""
    if not is_packed(module):
        return False
    del module.forward
    return True


def is_packed(module: nn.Module) -> bool:
    """Whether a module computes by a packed weight."""
    return type(vars(module).get("forward")) is PackedLinear
