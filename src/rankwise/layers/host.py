"""LoRAHost: a module that reads its own parameters, such as attention, and gets W0 + δ instead."""

from __future__ import annotations

import copy
import functools
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import RankwiseError, UserError
from rankwise.layers.layer import LoRALayer
from rankwise.layers.recomputing import is_recomputing
from rankwise.layers.update import Change

__all__ = ["LoRAHost", "host", "released", "widened"]


class LoRAHost(LoRALayer):
    """A twin of a module whose adapted parameters read as W0 + Σ δ_i.

    It is of a subclass of the module's own class, so its forward, its attributes and what others
    ask of its type are the module's; it shares every tensor and submodule with it. Reading an
    adapted parameter costs its dense δ each time. Used for nn.MultiheadAttention, for parameters
    without a layer of their own (the banks of mixtures of experts), and for trained biases of
    modules that are not adapted otherwise (norms).
    """

    read_as_sums: tuple[str, ...] = ()

    def routes(self, parameter: str | None) -> bool:
        """Not where the module reads it, but nn.LayerNorm is run by rows."""
        return parameter is None or type(self.base_layer).forward is nn.LayerNorm.forward

    def stored_weight(self, parameter: str) -> Tensor:
        return dict(self.named_parameters(recurse=False))[parameter]  # the base's may be older

    def branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        raise RankwiseError(f"{type(self).__name__} reads its weights and has no branch to run.")

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """The class is made at run time: pickle and copy get the way to make it again."""
        kind = type(self).__mro__[1 + type(self).__mro__.index(LoRALayer)]
        names = tuple(sorted(type(self).read_as_sums))
        return _blank, (kind, names), self.__dict__.copy()


# What the twin needs for itself, beside what every module has.
_NAMES = sorted({*dir(LoRAHost), "base_layer", "updates"} - {*dir(nn.Module)} - {"__slots__"})
_NAMES = [n for n in _NAMES if not n.startswith("_") and n != "update"]  # a convenience


def host(module: nn.Module, names: tuple[str, ...]) -> LoRAHost:
    """A twin of the module that reads these parameters with their updates; none are there yet."""
    taken = [name for name in _NAMES if name in dir(module)]
    if taken:
        raise UserError(
            f"{type(module).__name__} has a {taken[0]} of its own, a name that Rankwise needs in "
            "it. Rename it, or put the adapted parameter into a module by itself."
        )
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        vars(twin)[name] = vars(module)[name].copy()  # everything else, hooks too, they share
    if is_recomputing(twin):
        del twin.forward  # which would read the frozen parameters
    twin.__class__ = _class(type(module), tuple(sorted(names)))
    assert isinstance(twin, LoRAHost)
    object.__setattr__(twin, "base_layer", module)  # not a submodule: its tensors are the twin's
    twin.updates = nn.ModuleDict()
    return twin


def widened(layer: LoRAHost, names: tuple[str, ...]) -> None:
    """Let a host read these parameters with their updates as well."""
    have = set(type(layer).read_as_sums)
    if not have.issuperset(names):
        layer.__class__ = _class(type(layer.base_layer), tuple(sorted(have | set(names))))


def released(layer: LoRALayer) -> nn.Module:
    """The base module of a layer that has no updates left, as it is to hang in the model again.

    The base of a host gets the submodules, buffers and parameters that its twin has by now: they
    may carry other adapters, or have moved to another device.
    """
    base = layer.base_layer
    if isinstance(layer, LoRAHost):
        for name, module in layer.named_children():
            if name != "updates":
                setattr(base, name, module)
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(base, name, buffer)
        for name, parameter in layer.named_parameters(recurse=False):
            base.register_parameter(name, parameter)
        base.train(layer.training)
    return base


@functools.cache
def _class(kind: type[nn.Module], names: tuple[str, ...]) -> type[LoRAHost]:
    """One class for each kind and set of parameters, so that equal models compile once."""
    body: dict[str, object] = {name: _property(name) for name in names}
    body["read_as_sums"] = names
    body["__doc__"] = LoRAHost.__doc__
    if kind.forward is nn.LayerNorm.forward:
        body["forward"], body["position_axes"] = _layer_norm, _axes_of_norm
    return type(f"LoRA{kind.__name__}", (LoRAHost, kind), body)


def _layer_norm(layer: LoRAHost, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
    """nn.LayerNorm's own, and where rows have weights and biases of their own, run for each way."""
    norm = cast("nn.LayerNorm", layer)
    changes = [u for u in layer.live() if isinstance(u, Change)]
    routing = changes[0].switch.routing if changes else None
    if routing is None:
        return nn.LayerNorm.forward(norm, input)
    layer.fit_rows(routing, input)
    parts: list[Tensor] = []
    for way, rows in routing.rows.items():
        own = [u for u in changes if u.switch.adapter in way]
        held = {
            name: layer.changed(name, [u for u in own if u.layout.parameter == name])
            for name, _ in norm.named_parameters(recurse=False)
        }
        shape, x = norm.normalized_shape, rows.pick(input)
        parts.append(F.layer_norm(x, shape, held.get("weight"), held.get("bias"), norm.eps))
    return routing.join(parts)


_axes_of_norm = property(lambda layer: len(layer.normalized_shape))


def _property(name: str) -> property:
    return property(lambda layer: _read(name, layer))


def _read(name: str, layer: LoRAHost) -> Tensor:
    try:
        return layer.effective(name)
    except AttributeError as error:  # which would make Python hand out the frozen parameter
        raise RankwiseError(
            f"'{name}' of {type(layer).__name__} cannot be read: {error}"
        ) from error


def _blank(kind: type[nn.Module], names: tuple[str, ...]) -> LoRAHost:
    cls = _class(kind, names)
    return cls.__new__(cls)
