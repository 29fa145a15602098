"""Subclasses whose own forward computes a plain layer all the same, told by running them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

__all__ = ["embedding_gain", "is_scaled_embedding", "linear_alike"]

_SCALES = frozenset({"embed_scale", "scalar_embed_scale"})  # as transformers calls it
_FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def linear_alike(module: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear computes x Wᵀ + b and nothing else, as Falcon's does.

    Its forward is run on small layers, on inputs of one, two and three dimensions, with and without
    a bias, in training and evaluation. A module with attributes, buffers or parameters that an
    nn.Linear does not have is none: they may steer its forward.
    """
    return not _own(module, _linear(True)) and _computes_linear(type(module))


def is_scaled_embedding(module: nn.Embedding) -> bool:
    """Whether a subclass of nn.Embedding gives ``embed_scale`` times the row, as Gemma's does."""
    own = _own(module, _embedding())
    if "embed_scale" not in own or own - _SCALES:
        return False
    scale = module.embed_scale
    kind = type(module)
    return isinstance(scale, Tensor | float | int) and _scales(kind, isinstance(scale, Tensor))


def embedding_gain(module: nn.Embedding) -> Tensor | float | None:
    """What an embedding multiplies its rows with, in its weight's dtype; None for a plain one."""
    if type(module).forward is nn.Embedding.forward:
        return None
    scale = module.embed_scale
    assert isinstance(scale, Tensor | float | int)
    return scale.to(module.weight.dtype) if isinstance(scale, Tensor) else float(scale)


def _own(module: nn.Module, plain: nn.Module) -> set[str]:
    """Public names of what a module holds and the plain one does not."""
    return {name for name in _held(module) - _held(plain) if not name.startswith("_")}


def _held(module: nn.Module) -> set[str]:
    tensors = {n for n, _ in (*module.named_parameters(), *module.named_buffers())}
    return {*vars(module), *tensors, *(n for n, _ in module.named_children())}


@functools.cache
def _computes_linear(kind: type[nn.Linear]) -> bool:
    plain = nn.Linear.forward
    for bias in (True, False):
        layer = _linear(bias)
        layer.__class__ = kind
        for training in (True, False):
            layer.train(training)
            for shape in ((3,), (4, 3), (2, 4, 3)):
                x = _numbers(*shape)
                if not _same(_run(layer, x), plain(layer, x)):
                    return False
    return True


@functools.cache
def _scales(kind: type[nn.Embedding], as_tensor: bool) -> bool:
    plain = nn.Embedding.forward
    layer = _embedding()
    layer.__class__ = kind
    for scale in (3.0, -0.5):
        held = torch.tensor(scale, dtype=torch.float64, device="cpu") if as_tensor else scale
        vars(layer).update(embed_scale=held, scalar_embed_scale=scale)
        for ids in ([1, 4], [[0, 3], [2, 2]]):
            x = torch.tensor(ids, device="cpu")
            if not _same(_run(layer, x), plain(layer, x) * scale):
                return False
    return True


def _run(layer: nn.Module, x: Tensor) -> object:
    try:
        with torch.no_grad():
            return layer(x)
    except _FAULTS:
        return None


def _same(found: object, wanted: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return torch.allclose(found, wanted)


def _linear(bias: bool) -> nn.Linear:
    """A small layer, drawn from no generator."""
    layer = nn.Linear(3, 2, bias, device="meta")
    layer.register_parameter("weight", nn.Parameter(_numbers(2, 3)))
    if bias:
        layer.register_parameter("bias", nn.Parameter(_numbers(2)))
    return layer


def _embedding() -> nn.Embedding:
    layer = nn.Embedding(5, 3, device="meta")
    layer.register_parameter("weight", nn.Parameter(_numbers(5, 3)))
    return layer


def _numbers(*shape: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return torch.arange(1.0, count + 1, dtype=torch.float64, device="cpu").sin().reshape(shape)
