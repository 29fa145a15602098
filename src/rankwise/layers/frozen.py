"""Frozen quantised layers: what they are, and the dense weight that their numbers stand for."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "dense_weight",
    "is_quantized",
    "keep_order",
    "logical_shape",
    "own_parameter",
    "quantization",
    "reorder",
    "rounds_inputs",
]

TORCHAO = "torchao"
_BITSANDBYTES = {
    "Linear4bit": "bitsandbytes 4-bit",
    "LinearFP4": "bitsandbytes 4-bit",
    "LinearNF4": "bitsandbytes 4-bit",
    "Linear8bitLt": "bitsandbytes 8-bit",
}
_REORDERS = "support_avx512bf16_for_cpu"  # of a 4-bit layer: whether it packs for that kernel


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter that the module itself holds; None of another name.

    It is asked for every layer of a model, and reads the module's own table, as attributes of
    modules are found only after a search.
    """
    held: Mapping[str, nn.Parameter | None] = vars(module)["_parameters"]
    return held[name] if name in held else None  # noqa: SIM401 - TorchScript's table has no get


def quantization(module: nn.Module) -> str | None:
    """What kind of quantised layer this is, in words, or None for a plain one.

    Told by where the classes come from, without importing any of the packages: bitsandbytes'
    layers, and an nn.Linear whose weight is one of torchao's tensors.
    """
    if not isinstance(module, nn.Linear):
        return None
    kind = type(module)
    if kind.__module__.startswith("bitsandbytes."):
        return _BITSANDBYTES.get(kind.__name__)
    weight = type(own_parameter(module, "weight"))
    if weight is nn.Parameter:  # asked first: torch.compile cannot read its __module__
        return None
    return f"torchao {weight.__name__}" if weight.__module__.startswith(TORCHAO) else None


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight is stored in fewer bits than it stands for."""
    return quantization(module) is not None


def rounds_inputs(module: nn.Module) -> bool:
    """Whether the layer also rounds its inputs, so that no plain weight has its function."""
    return quantization(module) == "bitsandbytes 8-bit"


def logical_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weight, of a packed one as it would be stored plainly."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    weight = module.weight
    if not isinstance(weight, Tensor):  # pragma: no cover - excluded by refusal()
        raise TypeError(f"{type(module).__name__}.weight is not a tensor")
    return tuple(weight.shape)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as a plain dense tensor, detached; a quantised one is written out.

    A quantised weight comes in the dtype in which its layer computes. Nothing is kept, so every
    call of a quantised layer costs one pass over it.
    """
    weight = module.weight
    if not isinstance(weight, Tensor):  # pragma: no cover - excluded by refusal()
        raise TypeError(f"{type(module).__name__}.weight is not a tensor")
    kind = quantization(module)
    if kind is None:
        return weight.detach()
    if kind.startswith(TORCHAO):
        return weight.detach().dequantize()
    return _bitsandbytes_weight(module, weight, kind)


def _bitsandbytes_weight(module: nn.Module, weight: Tensor, kind: str) -> Tensor:
    from bitsandbytes import functional  # the layer exists, so the package is there

    if kind == "bitsandbytes 4-bit":
        state = weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
        if state is None:
            return weight.detach()  # not packed yet: that happens on the way to a device
        return functional.dequantize_4bit(*_unpacked(weight.detach(), state))
    if weight.dtype is not torch.int8:
        return weight.detach()
    scales = weight.SCB  # pyright: ignore[reportAttributeAccessIssue]
    if scales is None:  # the first forward moves them from the weight to the layer's state
        scales = module.state.SCB  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(scales, Tensor)
    return functional.int8_vectorwise_dequant(weight.detach(), scales)


def _unpacked(weight: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight and its state in the order of storage; both of the layer stay as they are.

    On a CPU with instructions for bfloat16 the first forward pass in evaluation mode packs them in
    place for its kernel, rounding the scales to bfloat16; no public function reads that order.
    """
    if not getattr(state, "packing_format_for_cpu", False):
        return weight, state
    from bitsandbytes import functional

    scales = state.absmax.T.reshape(-1).float()
    state = copy.copy(state)
    state.original_nested = False  # quantising the scales again would round them once more
    restore: Any = functional._convert_weight_packed_for_cpu_inverse  # pyright: ignore[reportPrivateUsage]
    weight, state = restore(weight, state)
    state.absmax = scales
    return weight, state


def keep_order(model: nn.Module) -> tuple[nn.Module, ...]:
    """Let 4-bit layers keep the order in which they store their numbers; which of them didn't.

    bitsandbytes reorders them in place, and rounds their scales, at the first forward pass in
    evaluation mode on a CPU with instructions for bfloat16. Its layer then gives its inputs no
    gradient any more, in training mode either, so that a model that is evaluated between two steps
    would learn wrongly. :func:`reorder` is the inverse.
    """
    if "bitsandbytes" not in sys.modules:
        return ()
    found: list[nn.Module] = []
    for module in model.modules():
        if quantization(module) == "bitsandbytes 4-bit" and vars(module).get(_REORDERS):
            weight: Any = module.weight
            weight.data, state = _unpacked(weight.data, weight.quant_state)
            weight.quant_state = module.quant_state = state
            setattr(module, _REORDERS, False)
            found.append(module)
    return tuple(found)


def reorder(layers: Iterable[nn.Module]) -> None:
    """Let 4-bit layers reorder their numbers again."""
    for layer in layers:
        setattr(layer, _REORDERS, True)
