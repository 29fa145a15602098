"""The neutral adapter: one method's learned tensors, taken from a model or put on one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.attaching import Placement, Plan, attachment, lora_layers, trained_copies
from rankwise.errors import ArtifactError, UserError, gather, nearest
from rankwise.layers import refusal, shape_of, wrap
from rankwise.lowrank import Factors
from rankwise.methods.head import describe_copies, outermost
from rankwise.methods.lora import LoRA
from rankwise.targets import Site, sites

__all__ = ["Adapter", "adapter_of"]


@dataclass(frozen=True)
class Adapter:
    """What was learned, apart from any model: the value that files are read into and written from.

    It is a method itself: ``rankwise.attach(model, adapter)`` puts it on a base.

    Attributes:
        method: how it was asked for; ``method.target_modules`` is exact for the adapted names.
        factors: A (r, in), B (out, r) and s of each adapted module, by its dotted name.
        modules: names of the modules that trained whole, such as the head.
        trained: their tensors, by full parameter or buffer name.
    """

    method: LoRA
    factors: Mapping[str, Factors]
    modules: tuple[str, ...] = ()
    trained: Mapping[str, Tensor] | None = None

    def plan(self, model: nn.Module) -> Plan:
        """Place every factor and every trained module on this model, or say all that is wrong.

        Raises:
            ArtifactError: a module is missing or has another shape, or a trained tensor does not
                fit: the adapter was made for another base.
        """
        table = sites(model)
        problems = [p for name in self.factors if (p := self._misfit(name, table))]
        problems.extend(p for name in self.modules if (p := self._module_misfit(name, table)))
        gather(ArtifactError, "The adapter does not fit this model", problems)
        names = outermost(self.modules)
        copied = tuple(Placement(table[name], self._trained_copy(name)) for name in names)
        return Plan(
            method=self.method,
            placements=(*(self._placement(table[name]) for name in self.factors), *copied),
            notes=(describe_copies(copied),) if copied else (),
        )

    def _placement(self, site: Site) -> Placement:
        spec = self.method.spec(site.name)
        factors = self.factors[site.name]

        def build(module: nn.Module) -> nn.Module:
            layer = wrap(module, spec)
            with torch.no_grad():
                layer.lora_A.copy_(factors.A)
                layer.lora_B.copy_(factors.B)
            return layer

        return Placement(site, build)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        prefix = name + "."
        every = self.trained or {}
        return {k.removeprefix(prefix): t for k, t in every.items() if k.startswith(prefix)}

    def _trained_copy(self, name: str) -> Callable[[nn.Module], nn.Module]:
        tensors = self._tensors(name)

        def build(module: nn.Module) -> nn.Module:
            fresh = copy.deepcopy(module)
            fresh.load_state_dict(tensors)
            return fresh

        return build

    def _misfit(self, name: str, table: Mapping[str, Site]) -> str | None:
        if name not in table:
            return f"the model has no module '{name}'.{nearest(name, table)}"
        factors, spec = self.factors[name], self.method.spec(name)
        if factors.r != spec.r or not math.isclose(factors.scale, spec.scale):
            return (
                f"'{name}' has factors of rank {factors.r} with scale {factors.scale:g}, and its "
                f"method asks for rank {spec.r} with scale {spec.scale:g}."
            )
        module = table[name].module
        reason = refusal(module)
        if reason is not None:
            return f"'{name}' cannot be adapted: {reason}."
        have, want = shape_of(module), (factors.out_features, factors.in_features)
        if have == want:
            return None
        return (
            f"'{name}' maps {have[1]} to {have[0]} in the model and {want[1]} to {want[0]} in the "
            "adapter."
        )

    def _module_misfit(self, name: str, table: Mapping[str, Site]) -> str | None:
        if name not in table:
            return f"the model has no module '{name}'.{nearest(name, table)}"
        wanted = {k: tuple(t.shape) for k, t in table[name].module.state_dict().items()}
        found = {k: tuple(t.shape) for k, t in self._tensors(name).items()}
        if wanted == found:
            return None
        return f"module '{name}' holds {wanted} in the model and {found} in the adapter."


def adapter_of(model: nn.Module) -> Adapter:
    """Take the learned tensors off a model, as copies on the CPU; the model keeps its own.

    Raises:
        UserError: the model carries no LoRA adapter, or it is merged.
    """
    record = attachment(model)
    if not isinstance(record.method, LoRA):
        raise UserError(f"{type(record.method).__name__} has no low-rank factors to take.")
    layers = lora_layers(model)
    if set(layers) != set(record.adapted):
        raise UserError("The adapter of this model is merged; call rankwise.unmerge(model) first.")
    factors = {
        name: Factors(_copy(layer.lora_A), _copy(layer.lora_B), layer.scale)
        for name, layer in layers.items()
    }
    copies = trained_copies(model)
    trained = {
        f"{name}.{key}": _copy(tensor)
        for name, module in copies.items()
        for key, tensor in module.state_dict().items()
    }
    return Adapter(record.method, factors, tuple(copies), trained)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
