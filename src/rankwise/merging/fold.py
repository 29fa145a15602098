"""merge and unmerge: new plain layers in the places of adapted ones, and the way back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator

import torch
from torch import Tensor, nn

from rankwise.attaching import adapted_sites, attachment, base, forget, note_kept, unmerged
from rankwise.errors import RankwiseError, UserError, gather
from rankwise.layers import LoRALayer, weight_of
from rankwise.lowrank import Factors
from rankwise.merging.certificate import Certificate, certify
from rankwise.merging.effect import Probe, full_float32, instead
from rankwise.merging.rounding import blocks
from rankwise.targets import Site, shared_weights, sites

__all__ = ["MergeError", "merge", "merged", "unmerge"]


class MergeError(RankwiseError):
    """A merge that did not pass its certificate; the model is as it was before."""

    exit_code = 3

    def __init__(self, certificate: Certificate) -> None:
        super().__init__(certificate)
        self.certificate = certificate

    def __str__(self) -> str:
        return f"{self.certificate.line()}. The model was not changed."


def merge(model: nn.Module, *, keep: bool = True, probe: Probe | None = None) -> Certificate:
    """Give every adapted layer a plain one in its place, with W' = W0 + δ, and certify it.

    W' is computed in float32 (float64 for a float64 base), a few rows at a time, and rounded once
    to the dtype of W0. The plain layer is of the base layer's class and settings, on its device,
    and holds the same bias object; no base weight is written. Where W0 was tied to another
    module's weight, that module keeps W0 (``Certificate.untied`` names both). Trained copies, such
    as the head, stay where they are. The certificate is made before anything is changed.

    Args:
        model: what :func:`rankwise.attach` was called on.
        keep: keep the adapted layers aside, so that :func:`unmerge` can put them back; changes
            made to the plain layers are then lost. Without it the model is plain afterwards: each
            adapted layer is given up as soon as its plain one is made, so that no more than one
            weight is held twice, and nothing of the adapter is left but its effect.
        probe: inputs to compare the outputs of the whole model on: a tensor, positional inputs,
            or inputs by keyword. Without it only the layers are compared, each by itself.

    Raises:
        MergeError: the certificate does not pass; the model is then as it was.
        UserError: the model carries no adapter, it is merged already, or an adapted layer cannot
            be rebuilt (its weight is parametrized, or its forward was replaced).
    """
    unmerged(model)
    adapted = adapted_sites(model)
    gather(UserError, "The adapter cannot be merged", [p for s, m in adapted if (p := _bar(s, m))])
    stand_in = plain if keep else streamed
    twins = {site.name: stand_in(layer) for site, layer in adapted}
    certificate = certify(model, twins, probe, _untied(model))
    if not certificate.passed:
        raise MergeError(certificate)
    if keep:
        _put_aside(model, adapted, twins)
    else:
        twins.clear()
        _replace(adapted)
        forget(model)
    return certificate


def unmerge(model: nn.Module) -> None:
    """Put the adapted layers back that :func:`merge` kept: the same objects, bit for bit.

    They follow the plain layers to their device and their mode of training or evaluation.

    Raises:
        UserError: nothing is merged, or a plain layer was replaced or cast in the meantime.
    """
    kept = attachment(model).kept
    if kept is None:
        raise UserError(
            "The adapter of this model is not merged. unmerge is the way back from "
            "rankwise.merge(model); after merge(model, keep=False) there is none."
        )
    table = sites(model)
    problems = [
        p
        for name, (twin, layer) in kept.items()
        if (p := _lost(name, table.get(name), twin, layer))
    ]
    gather(UserError, "The adapted layers cannot be put back", problems)
    for name, (twin, layer) in kept.items():
        layer.to(weight_of(twin).device)
        layer.train(twin.training)
        table[name].put(layer)
    note_kept(model, None)


@contextlib.contextmanager
def merged(model: nn.Module, *, probe: Probe | None = None) -> Generator[Certificate]:
    """The model merged for the length of the block, whatever happens in it; yields the certificate.

    Raises:
        MergeError, UserError: as :func:`merge` does.
    """
    certificate = merge(model, probe=probe)
    try:
        yield certificate
    finally:
        unmerge(model)


def merged_weight(layer: LoRALayer) -> Tensor:
    """W' = W0 + δ, laid out and rounded as W0 is, from float32 (float64) blocks of rows."""
    stored = weight_of(layer.base_layer).detach()
    wide = torch.promote_types(stored.dtype, torch.float32)
    a, b = layer.lora_A.detach().to(wide), layer.lora_B.detach().to(wide)
    result = torch.empty_like(stored)
    source, target = (stored.T, result.T) if layer.transposed else (stored, result)
    with torch.no_grad(), full_float32(), _no_autocast(stored):
        for rows in blocks(layer):
            target[rows] = source[rows].to(wide) + Factors(a, b[rows], layer.scale).delta()
    return result


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def plain(layer: LoRALayer) -> nn.Module:
    """A layer of the base layer's class and settings that holds W' and the same bias object."""
    twin = _twin(layer)
    weight = nn.Parameter(merged_weight(layer), requires_grad=False)
    twin.register_parameter("weight", weight)
    return twin


def streamed(layer: LoRALayer) -> nn.Module:
    """A layer as :func:`plain` makes it, which holds W0 and computes W' whenever it is read.

    With it a merge can be measured before a base weight is given up, and at most one W' is held.
    """
    twin = _twin(layer)
    vars(twin)["layer"] = layer  # on the object: a class lives until the garbage is collected
    kind = type(twin)
    computed = property(lambda self: merged_weight(vars(self)["layer"]))
    twin.__class__ = type(kind.__name__, (kind,), {"weight": computed})
    return twin


def _twin(layer: LoRALayer) -> nn.Module:
    """A second module around the tensors of the base layer, with settings and hooks of its own."""
    twin = copy.copy(layer.base_layer)
    for name, value in vars(layer.base_layer).items():
        if isinstance(value, (dict, set)):
            vars(twin)[name] = value.copy()
    return twin


def _bar(site: Site, layer: LoRALayer) -> str | None:
    """Why no plain layer can be made in the place of this one, or None."""
    original = layer.base_layer
    if "weight" not in dict(original.named_parameters(recurse=False)):
        return (
            f"the weight of '{site.name}' is computed from other tensors; make it a plain one "
            "first (torch.nn.utils.parametrize.remove_parametrizations)."
        )
    if "forward" in vars(original):
        return (
            f"the forward of '{site.name}' was replaced on the object, as accelerate's hooks do; "
            "take them off first (accelerate.hooks.remove_hook_from_module)."
        )
    return None


def _put_aside(
    model: nn.Module, adapted: list[tuple[Site, LoRALayer]], twins: dict[str, nn.Module]
) -> None:
    for site, _ in adapted:
        site.put(twins[site.name])
    note_kept(model, {site.name: (twins[site.name], layer) for site, layer in adapted})


def _replace(adapted: list[tuple[Site, LoRALayer]]) -> None:
    """Put plain layers in, letting go of each adapted one before the next is begun."""
    while adapted:
        site, layer = adapted.pop()
        site.put(plain(layer))
        del site, layer


def _lost(name: str, site: Site | None, twin: nn.Module, layer: LoRALayer) -> str | None:
    if site is None or site.module is not twin:
        return f"'{name}' is not the plain layer that merge put there; put that one back first."
    now, then = weight_of(twin).dtype, weight_of(layer.base_layer).dtype
    if now != then:
        return (
            f"'{name}' was cast from {then} to {now} since it was merged, and the kept layer is "
            "still the former. Cast the model back, or cast it before merging."
        )
    return None


def _untied(model: nn.Module) -> tuple[str, ...]:
    """Modules that shared a weight in the base and will not when merged, in the model's order."""
    record, table = attachment(model), sites(model)
    changed = (*record.adapted, *record.originals)
    with base(model), instead([(table[name], m) for name, m in record.originals.items()]):
        groups = shared_weights(model)
        modules = dict(model.named_modules(remove_duplicate=False))
    names: list[str] = []
    for group in groups:
        owners = {id(modules[n]): n for n in reversed([g.rpartition(".")[0] for g in group])}
        parts = {_part(name, changed) for name in owners.values()}
        if len(owners) > 1 and len(parts) > 1:
            names.extend(reversed(owners.values()))
    return tuple(dict.fromkeys(names))


def _part(name: str, changed: tuple[str, ...]) -> str | None:
    """The changed module that this one is or lies in, or None."""
    return next((c for c in changed if name == c or name.startswith(c + ".")), None)
