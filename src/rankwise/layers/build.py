"""Putting a layer in the place of a module, and updates into a layer."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.inits import Init, Start
from rankwise.layers.host import LoRAHost, host, widened
from rankwise.layers.layer import LoRAConv, LoRAEmbedding, LoRALayer, LoRALinear
from rankwise.layers.layout import CONVOLUTIONS, Layout, is_wrapped, layout_of
from rankwise.layers.spec import Spec, Switch
from rankwise.layers.update import LowRank, Offset, TokenRows, Update, place_of, wide_dtype

__all__ = ["adapt", "bare", "drop_updates", "low_rank", "offset", "token_rows", "wrap"]


def bare(module: nn.Module) -> nn.Module:
    """The base module itself, where an adapted layer stands for it."""
    return module.base_layer if isinstance(module, LoRALayer) else module


def adapt(module: nn.Module, parameters: tuple[str, ...]) -> LoRALayer:
    """A layer for updates of these parameters: a new one, or the one that is there already."""
    if isinstance(module, LoRAHost):
        widened(module, parameters)
        return module
    if isinstance(module, LoRALayer):
        return module
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding(module)
    if isinstance(module, CONVOLUTIONS):
        return LoRAConv(module)
    return LoRALinear(module) if is_wrapped(module) else host(module, parameters)


def wrap(module: nn.Module, spec: Spec, adapter: str = "default") -> LoRALayer:
    """A layer around one module with one low-rank update, for models that are built by hand.

    :func:`rankwise.attach` does this for the modules of a model and keeps the record that detach,
    merge and save need.
    """
    layer = adapt(module, ("weight",))
    layer.updates[adapter] = low_rank(layer, layout_of(module), spec, Switch(adapter))
    return layer


def low_rank(
    layer: LoRALayer,
    layout: Layout,
    spec: Spec,
    switch: Switch,
    name: str = "",
    start: Start | None = None,
    lent: bool = False,
) -> LowRank:
    """A low-rank update for a weight of this layer, started as its spec says or as given.

    It trains copies of the tensors that are given; where they are ``lent``, the tensors themselves.

    Raises:
        UserError: the start needs a running model and none was made, or does not suit the weight.
    """
    place = place_of(layer, layout, spec, name)
    if start is None:
        if not _starts_alone(type(spec.init)):
            raise UserError(
                f"{type(spec.init).__name__} looks at the running model and cannot start "
                f"'{name}' by itself; attach it with rankwise.attach."
            )
        start = cast("Init", spec.init).start(place)
        held = [_own(t) for t in (start.A, start.B)]  # drawn for this layer: not copied again
    else:
        held = [t.detach() if lent else t.detach().clone() for t in (start.A, start.B)]
    A, B = (t.to(place.device, place.dtype) for t in held)
    update = LowRank(spec, Start(A, B, subtract=start.subtract), layout, switch)
    if not layer.training:  # modules begin in training mode
        update.train(False)
    if spec.dora:
        update.measure(layer)
    return update


def offset(
    layer: LoRALayer, layout: Layout, switch: Switch, values: Tensor | None = None
) -> Offset:
    """A trained change of a bias, zero at the start unless values are given."""
    like = next(iter(layer.base_layer.parameters()))
    dtype = wide_dtype(like)
    zeros = torch.zeros(layout.shape, dtype=dtype, device=like.device)
    return Offset(layout, switch, zeros if values is None else values.to(zeros))


def token_rows(
    layer: LoRALayer,
    layout: Layout,
    ids: tuple[int, ...],
    switch: Switch,
    values: Tensor | None = None,
) -> TokenRows:
    """Trained rows of an embedding, without change at the start unless values are given."""
    like = layer.stored_weight(layout.parameter)
    zeros = torch.zeros(len(ids), layout.out_features, dtype=wide_dtype(like), device=like.device)
    return TokenRows(ids, zeros if values is None else values.to(zeros), layout, switch)


def drop_updates(layer: LoRALayer, adapter: str) -> bool:
    """Take the updates of one adapter out of a layer; whether the layer has none left."""
    for key, update in list(layer.updates.items()):
        if isinstance(update, Update) and update.switch.adapter == adapter:
            del layer.updates[key]
    return not layer.updates


@functools.cache
def _starts_alone(kind: type) -> bool:
    """Whether a start of this class is an Init; remembered, as protocols are slow to ask."""
    return issubclass(kind, Init)


def _own(factor: Tensor) -> Tensor:
    """The factor, in a storage of just its size."""
    factor = factor.detach()
    alone = factor.is_contiguous() and factor.untyped_storage().nbytes() == factor.nbytes
    return factor if alone else factor.clone(memory_format=torch.contiguous_format)
