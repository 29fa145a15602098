"""merge and unmerge: new plain layers in the places of adapted ones, and the way back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Generator, Iterable

import torch
from torch import Tensor, nn

from rankwise.attaching import (
    adapted_sites,
    attachments,
    base,
    forget,
    kept_layers,
    note_kept,
    unrouted,
)
from rankwise.errors import RankwiseError, UserError, gather
from rankwise.layers import (
    LoRAHost,
    LoRALayer,
    Shared,
    is_packed,
    is_quantized,
    is_recomputing,
    quantization,
    rounds_inputs,
    unpack,
)
from rankwise.merging.blocks import BLOCK, Spares, held, sum_of
from rankwise.merging.certificate import Certificate, certify
from rankwise.merging.effect import Probe, full_float32, instead
from rankwise.merging.rounding import check_name
from rankwise.merging.sample import Writing
from rankwise.targets import Site, shared_weights, sites

__all__ = ["MergeError", "merge", "merged", "unmerge"]


_HELD = "_rankwise_layer"  # of a twin that computes W', the layer it stands for


class MergeError(RankwiseError):
    """A merge that did not pass its certificate; the model is as it was before."""

    exit_code = 3

    def __init__(self, certificate: Certificate) -> None:
        super().__init__(certificate)
        self.certificate = certificate

    def __str__(self) -> str:
        return f"{self.certificate.line()}. The model was not changed."


def merge(model: nn.Module, *, keep: bool = True, probe: Probe | None = None) -> Certificate:
    """Give every adapted layer a plain one in its place, with W' = W0 + Σ δ, and certify it.

    The adapters that are active are merged; all of the model's must be.

    W' is computed in float32 (float64 for a float64 base), a few rows at a time, and rounded once
    to the dtype of W0. The plain layer is of the base layer's class and settings, on its device,
    and holds the same bias object; no base weight is written. Where W0 was tied to another
    module's weight, that module keeps W0 (``Certificate.untied`` names both), unless the update is
    on both. A quantised layer that only stores its weight in fewer bits becomes a plain one in the
    dtype in which it computes; W0 is then what its numbers stand for. Trained copies, such as the
    head, stay where they are. The certificate is made before anything is changed. Of weights with
    more than 2^18 numbers it compares some rows number by number, and all in sums over short runs,
    which are made as each W' is written. Without ``keep`` that is after the certificate, before
    its W0 is given up, and a W' that does not hold its sums is computed anew in float64.

    Args:
        model: what :func:`rankwise.attach` was called on.
        keep: keep the adapted layers aside, so that :func:`unmerge` can put them back; changes
            made to the plain layers are then lost. Without it the model is plain afterwards: each
            adapted layer is given up as soon as its plain one is made, so that no more than one
            weight of each size is held twice, and nothing of the adapter is left but its effect.
            The memory of a W0 that nobody else can see is written with the next W' of its size.
        probe: inputs to compare the outputs of the whole model on: a tensor, positional inputs,
            or inputs by keyword. Without it only the layers are compared, each by itself.

    Raises:
        MergeError: the certificate does not pass; the model is then as it was.
        UserError: the model carries no adapter, it is merged already, or an adapted layer cannot
            be rebuilt (its weight is parametrized, or its forward was replaced).
    """
    asleep = [record.name for record in unrouted(model).values() if not record.active]
    if asleep:
        raise UserError(
            f"{', '.join(asleep)}: attached and not active. Activate what is to be merged "
            "(rankwise.set_active), and detach what is not (rankwise.detach)."
        )
    adapted = adapted_sites(model)
    gather(UserError, "The adapter cannot be merged", [p for s, m in adapted if (p := _bar(s, m))])
    writing = Writing()
    twins = {s.name: plain(m, s.name, writing) if keep else streamed(m) for s, m in adapted}
    _keep_tied(adapted, twins)
    certificate = certify(model, twins, probe, _untied(model), writing.sums)
    if not certificate.passed:
        raise MergeError(certificate)
    if keep:
        _put_aside(model, adapted, twins)
    else:
        homes = [(site.name, site.places) for site, _ in adapted]
        twins.clear()
        adapted.clear()
        certificate = certificate.with_sums(_replace(model, homes))
        forget(model)
    return certificate


def unmerge(model: nn.Module) -> None:
    """Put the adapted layers back that :func:`merge` kept: the same objects, bit for bit.

    They follow the plain layers to their device and their mode of training or evaluation.

    Raises:
        UserError: nothing is merged, or a plain layer was replaced or cast in the meantime.
    """
    kept = kept_layers(model)
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
        device = next(twin.parameters()).device
        layer.to(device)
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


def merged_weight(
    layer: LoRALayer, parameter: str, name: str = "", writing: Writing | None = None
) -> Tensor:
    """W' = W0 + Σ δ, laid out and rounded once as W0 is; a sum of products in blocks of rows.

    Of a large one ``writing`` gets the sums, under the name of the site.
    """
    stored = layer.base_weight(parameter) if _has(layer, parameter) else None
    with torch.no_grad(), full_float32():
        if stored is None:
            return torch.stack([u.dense(layer) for u in layer.changes(parameter)]).sum(0)
        with _no_autocast(stored):
            total = sum_of(layer, parameter, stored)
            if total is None:
                return layer.effective(parameter).contiguous()
            if writing is None:
                return total.whole(BLOCK)
            return writing.write(check_name(name, parameter), layer, parameter, total, BLOCK)


def _has(layer: LoRALayer, parameter: str) -> bool:
    return parameter in dict(layer.base_layer.named_parameters(recurse=False))


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def plain(layer: LoRALayer, name: str = "", writing: Writing | None = None) -> nn.Module:
    """A module of the base layer's class and settings that holds the merged parameters.

    Whatever is not adapted in it is the same object as in the base.
    """
    twin = _twin(layer)
    for parameter in layer.adapted():
        value = nn.Parameter(merged_weight(layer, parameter, name, writing), requires_grad=False)
        twin.register_parameter(parameter, value)
    return twin


def streamed(layer: LoRALayer) -> nn.Module:
    """A module as :func:`plain` makes it, which holds W0 and computes W' whenever it is read.

    With it a merge can be measured before a base weight is given up, and at most one W' is held.
    """
    twin = _twin(layer)
    vars(twin)[_HELD] = layer  # on the object: a class lives until the garbage is collected
    kind = type(twin)
    body = {name: _computed(name) for name in layer.adapted()}
    twin.__class__ = type(kind.__name__, (kind,), body)
    return twin


def _computed(parameter: str) -> property:
    return property(lambda self: merged_weight(vars(self)[_HELD], parameter))


def _twin(layer: LoRALayer) -> nn.Module:
    """A second module around the tensors of the base layer, with settings and hooks of its own.

    In the place of a quantised layer it is a plain one.
    """
    original = layer.base_layer
    if is_quantized(original):
        return _dequantized(layer)
    source = layer if isinstance(layer, LoRAHost) else original
    twin = copy.copy(source)
    for name, value in vars(source).items():
        if isinstance(value, dict | set):
            vars(twin)[name] = value.copy()
    unpack(twin)  # its weight is another
    if isinstance(layer, LoRAHost):
        object.__setattr__(twin, "__class__", type(original))
        delattr(twin, "updates")
        del vars(twin)["base_layer"]
    return twin


def _dequantized(layer: LoRALayer) -> nn.Module:
    original = layer.base_layer
    assert isinstance(original, nn.Linear)
    weight = layer.base_weight("weight")
    twin = nn.Linear(original.in_features, original.out_features, bias=False, device="meta")
    twin.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    twin.register_parameter("bias", original.bias)
    return twin.train(original.training)


def _keep_tied(adapted: list[tuple[Site, LoRALayer]], twins: dict[str, nn.Module]) -> None:
    """Where one update is on two layers of one weight, let them share the merged weight too."""
    for name, first in _joined(adapted).items():
        if held(twins[name], "weight") is not None:
            twins[name].register_parameter("weight", twins[first].get_parameter("weight"))


def _joined(adapted: list[tuple[Site, LoRALayer]]) -> dict[str, str]:
    """The layers whose every update of the weight is another's, by name, with that other's name.

    They hold one weight before and after.
    """
    changes = {site.name: layer.changes("weight") for site, layer in adapted}
    homes = {id(u): name for name, updates in changes.items() for u in updates}
    found: dict[str, str] = {}
    for name, updates in changes.items():
        sources = [u.source for u in updates if isinstance(u, Shared)]
        if sources and len(sources) == len(updates):
            first = homes[id(sources[0])]
            if {id(u) for u in changes[first]} == {id(u) for u in sources}:
                found[name] = first
    return found


def _bar(site: Site, layer: LoRALayer) -> str | None:
    """Why no plain layer can be made in the place of this one, or None."""
    original = layer.base_layer
    if rounds_inputs(original):
        return (
            f"'{site.name}' ({quantization(original)}) rounds its inputs as well, so no plain "
            "weight has its function. Load the base unquantised, attach the adapter, merge there."
        )
    barrier = next((u.barrier for u in layer.live() if u.barrier), None)
    if barrier is not None:
        return f"what was added to '{site.name}' {barrier}."
    parameters = dict(original.named_parameters(recurse=False))
    missing = [p for p in layer.adapted() if p not in parameters and p != "bias"]
    if missing and not is_quantized(original):
        return (
            f"the {missing[0]} of '{site.name}' is computed from other tensors; make it a plain "
            "one first (torch.nn.utils.parametrize.remove_parametrizations)."
        )
    if "forward" in vars(original) and not (is_packed(original) or is_recomputing(original)):
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


def _replace(model: nn.Module, homes: list[tuple[str, tuple[str, ...]]]) -> dict[str, float]:
    """Put plain layers in, letting go of each adapted one before the next is begun.

    The outer ones come first, as an inner one hangs in them. Layers that share an update are
    replaced together. Returns the sums of the large weights, by the name of their check.
    """
    shared = [
        (s, m) for s, m in adapted_sites(model) if any(isinstance(u, Shared) for u in m.live())
    ]
    sources = {id(u.source) for _, m in shared for u in m.live() if isinstance(u, Shared)}
    together = [
        (s, m) for s, m in adapted_sites(model) if any(id(u) in sources for u in m.live())
    ] + shared
    spares = Spares(w for name, _ in homes for w in _own(model.get_submodule(name)))
    writing = Writing(mend=True, spares=spares)
    twins = {site.name: plain(layer, site.name, writing) for site, layer in together}
    _keep_tied(together, twins)
    del shared, together
    for name, places in homes:
        layer = model.get_submodule(name)
        assert isinstance(layer, LoRALayer)
        twin = twins[name] if name in twins else plain(layer, name, writing)
        Site(name, layer, places, model).put(twin)
        old = _own(layer)
        del layer, twin
        while old:
            spares.give(old.pop())
    return writing.sums


def _own(layer: nn.Module) -> list[Tensor]:
    """The adapted parameters of the base, plain ones, under other names than theirs."""
    assert isinstance(layer, LoRALayer)
    parameters = dict(layer.base_layer.named_parameters(recurse=False))
    found = (parameters.get(name) for name in layer.adapted())
    return [p.detach() for p in found if type(p) is nn.Parameter]


def _lost(name: str, site: Site | None, twin: nn.Module, layer: LoRALayer) -> str | None:
    if site is None or site.module is not twin:
        return f"'{name}' is not the plain layer that merge put there; put that one back first."
    for parameter in layer.adapted():
        now, then = getattr(twin, parameter).dtype, layer.base_weight(parameter).dtype
        if now != then and _has(layer, parameter) and not is_quantized(layer.base_layer):
            return (
                f"'{name}' was cast from {then} to {now} since it was merged, and the kept layer "
                "is still the former. Cast the model back, or cast it before merging."
            )
    return None


def _untied(model: nn.Module) -> tuple[str, ...]:
    """Modules that shared a parameter in the base and will not when merged, in the model's order.

    A parameter is a weight or a bias: BERT's output layer shares its bias with the module around
    it. Those that one update is on (``tied``) stay shared.
    """
    table = sites(model)
    active = [record for record in attachments(model).values() if record.active]
    originals = {n: m for record in active for n, m in record.originals.items()}
    joined = {f"{name}.weight" for name in _joined(adapted_sites(model))}
    changed = {f"{n}.{p}" for n, site in table.items() for p in _adapted(site.module)}
    with base(model), instead([(table[name], m) for name, m in originals.items()]):
        groups = shared_weights(model)
        modules = dict(model.named_modules(remove_duplicate=False))
    names: list[str] = []
    for group in groups:
        owners = {id(modules[n.rpartition(".")[0]]): n for n in reversed(group)}
        parts = {_part(name, changed, originals) for name in owners.values()}
        apart = [name for name in owners.values() if name not in joined]
        if len(owners) > 1 and len(parts) > 1 and len(apart) > 1:
            names.extend(name.rpartition(".")[0] for name in reversed(owners.values()))
    return tuple(dict.fromkeys(names))


def _adapted(module: nn.Module) -> list[str]:
    return module.adapted() if isinstance(module, LoRALayer) else []


def _part(parameter: str, changed: Collection[str], copied: Iterable[str]) -> str | None:
    """The copied module that a parameter lies in, itself where it is changed, or None."""
    inside = (name for name in copied if parameter.startswith(name + "."))
    return next(inside, parameter if parameter in changed else None)
