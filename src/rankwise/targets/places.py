"""Where modules and weights are in a model: sites, targets, and weights that are shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.layers import (
    Layout,
    LoRAHost,
    LoRALayer,
    Split,
    bare,
    dense_weight,
    is_conv1d,
    layouts,
)
from rankwise.targets.patterns import first_match

__all__ = ["Site", "Target", "shared_weights", "sites", "targets_of"]


@dataclass(frozen=True)
class Site:
    """One module of a model and every place that holds it.

    Attributes:
        name: its first dotted name from ``model.named_modules()``.
        module: the module itself, an adapted layer where there is one.
        places: the dotted name of every place where this same object hangs.
        root: the model.
    """

    name: str
    module: nn.Module
    places: tuple[str, ...]
    root: nn.Module = field(repr=False)

    @property
    def base(self) -> nn.Module:
        """The base's own module, also where an adapted layer stands for it."""
        return bare(self.module)

    def owners(self) -> Iterator[tuple[nn.Module, str]]:
        """The parent and the attribute of every place, as the model is now."""
        for place in self.places:
            *above, attribute = place.split(".")
            parent = self.root
            for part in above:  # faster than get_submodule, and asked for every target
                child = vars(parent)["_modules"].get(part)
                parent = parent.get_submodule(part) if child is None else child
            yield parent, attribute

    def put(self, module: nn.Module) -> None:
        """Hang another module in every place of this one."""
        for parent, attribute in self.owners():
            setattr(parent, attribute, module)


@dataclass(frozen=True)
class Target:
    """One weight that can be adapted: a module, a part of one, or a parameter of one.

    Attributes:
        site: the module that holds it.
        layout: which parameter of the module, and which rows of it.
    """

    site: Site
    layout: Layout

    @property
    def name(self) -> str:
        """The module's name, and behind it the part's or the parameter's where it is not all."""
        return self.site.name + self.layout.suffix

    def weight(self) -> Tensor:
        """W0 (out, in), or (E, out, in) of a bank, of a module that no adapter is on."""
        module, layout = self.site.base, self.layout
        plain = layout.parameter == "weight"
        stored = dense_weight(module) if plain else module.get_parameter(layout.parameter).detach()
        return layout.cut(layout.matrix(stored))


def sites(model: nn.Module) -> dict[str, Site]:
    """Every module below ``model`` by its first name, with all the places that hold it.

    What lies inside a layer around another module is not listed: the layer stands for it. Of a
    module that is adapted by its parameters the submodules are listed.
    """
    named: dict[int, tuple[str, nn.Module]] = {}
    places: dict[int, list[str]] = {}
    hung: set[tuple[int, str]] = set()
    for parent, attribute, name, module in _hung(model):
        place = (id(parent), attribute)
        if place not in hung:
            hung.add(place)
            named.setdefault(id(module), (name, module))
            places.setdefault(id(module), []).append(name)
    return {
        name: Site(name, module, tuple(places[key]), model) for key, (name, module) in named.items()
    }


def _hung(parent: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """The parent, attribute, name and module of every place, in the order of named_modules.

    What lies inside a layer is passed over, as it grows with every adapter.
    """
    for attribute, module in vars(parent)["_modules"].items():
        if module is None or (attribute == "updates" and isinstance(parent, LoRAHost)):
            continue
        name = prefix + attribute
        yield parent, attribute, name, module
        if isinstance(module, LoRAHost) or not isinstance(module, LoRALayer):
            yield from _hung(module, f"{name}.")


def targets_of(
    model: nn.Module,
    split: Mapping[str, Split] | None = None,
    table: Mapping[str, Site] | None = None,
) -> dict[str, Target]:
    """Every weight of a model that can be named, whether it can be adapted or not.

    ``split`` says by pattern which fused projections have parts; ``table`` is :func:`sites` of the
    model, where the caller has it.

    Raises:
        UserError: a pattern of ``split`` means no Linear or Conv1D, or does not fit.
    """
    split = split or {}
    unused = set(split)
    found: dict[str, Target] = {}
    for name, site in (sites(model) if table is None else table).items():
        module = site.base
        key = None
        if split and (isinstance(module, nn.Linear) or is_conv1d(module)):
            key = first_match(split, name)
            unused.discard(key or "")
        for layout in layouts(module, split[key] if key is not None else None).values():
            target = Target(site, layout)
            found.setdefault(target.name, target)
    if unused:
        raise UserError(
            f"split: {', '.join(map(repr, sorted(unused)))} means no Linear or Conv1D of this "
            "model."
        )
    return found


def shared_weights(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of parameter names that share one storage, such as a tied embedding and output layer.

    Told by storage, not by name: the same Parameter object, or two that start at the same address.
    The names are those of the base, also where it carries adapters.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, parameter in _own_parameters(model):
        groups.setdefault(_storage(parameter), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _own_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Every place of every parameter by the base's names, in the order of named_parameters."""
    for key, parameter in vars(module)["_parameters"].items():
        if parameter is not None:
            yield prefix + key, parameter
    layer = isinstance(module, LoRALayer)
    for key, child in vars(module)["_modules"].items():
        if child is not None and not (layer and key == "updates"):
            inner = prefix if layer and key == "base_layer" else f"{prefix}{key}."
            yield from _own_parameters(child, inner)


def _storage(tensor: Tensor) -> tuple[object, ...]:
    if tensor.is_meta or tensor.numel() == 0:
        return ("object", id(tensor))
    return (tensor.device, tensor.data_ptr())
