"""What the updates of a model do to its outputs on a probe, all together and one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rankwise.attaching import adapted_sites, base, unrouted, updates_of
from rankwise.errors import RankwiseError, UserError, gather
from rankwise.layers import (
    Change,
    LoRAConv,
    LoRAEmbedding,
    LoRAHost,
    LoRALayer,
    LowRank,
    Network,
    Prefix,
    Shared,
    Update,
)
from rankwise.targets import Site

__all__ = ["EffectError", "Probe", "check_effect", "effects"]

Probe = Tensor | Sequence[object] | Mapping[str, object]
"""What a model is run on: one tensor, positional inputs, or inputs by keyword."""


class EffectError(RankwiseError):
    """An update that was attached does nothing: it did not train, or its owner passes it by."""

    exit_code = 3


def effects(model: nn.Module, probe: Probe) -> dict[str, float]:
    """How much each update matters: max |y - y_i|, with y_i the outputs without update i.

    Those are low-rank updates, bottlenecks and prefixes; not the offsets of biases.

    One run of the model, and one more for each update of an active adapter, in evaluation mode;
    the model is left as it was. The outputs are compared as :func:`outputs` reads them. Where
    several adapters act, the names are ``adapter:module``.

    Raises:
        UserError: the model carries no adapter, it is merged, or its outputs hold no numbers.
    """
    unrouted(model)
    with at_rest(model):
        whole = outputs(model, probe)
        return {
            name: _effect(model, probe, whole, update)
            for name, (_, update) in _acting(model).items()
        }


def _acting(model: nn.Module) -> dict[str, tuple[Site, Update]]:
    """The updates that act, with the module of each, by name; not the offsets of biases."""
    active = [record for record in unrouted(model).values() if record.active]
    table = {site.name: site for site, _ in adapted_sites(model)}
    return {
        name if len(active) == 1 else f"{record.name}:{name}": (
            table[record.places[name][0]],
            update,
        )
        for record in active
        for name, update in updates_of(model, record.name).items()
        if isinstance(update, LowRank | Network | Prefix)
    }


def check_effect(model: nn.Module, probe: Probe | None = None, *, each: bool = False) -> None:
    """Refuse an adapter of which a part does nothing, naming the layers.

    Without a probe, an update counts as nothing when A or B is all zeros: it got no gradient.
    With a probe, the outputs must change when the adapter is taken away as a whole (two runs),
    and when the update of any layer whose ``forward`` was not called is taken away (one run for
    each such layer): its owner may read ``.weight``, which is fine, or hold on to a weight of its
    own. ``each`` asks the same of every layer, at one run for each. A bottleneck counts as nothing
    when U and its bias are zero; a prefix is only asked for what it does. HeadOnly, Full and BitFit
    have nothing to check.

    Raises:
        EffectError: names every layer without effect.
        UserError: the model carries no adapter, it is merged, or its outputs hold no numbers.
    """
    unrouted(model)
    adapted = _acting(model)
    title = "The adapter has no effect in part"
    gather(EffectError, title, [p for name, (_, u) in adapted.items() if (p := _zero(name, u))])
    if probe is None or not adapted:
        return
    with at_rest(model):
        with recorded_inputs(adapted_sites(model)) as inputs:
            whole = outputs(model, probe)
        with base(model):
            without = outputs(model, probe)
        if difference(whole, without) == 0:
            raise EffectError(
                f"The outputs of {type(model).__name__} are the same with the adapter and without "
                f"it on this probe, though {len(adapted)} layer(s) carry an update, the first "
                f"being '{next(iter(adapted))}'. The outputs do not depend on these layers: adapt "
                "layers that they pass through, or probe with inputs that reach them."
            )
        asked = {n: (s, u) for n, (s, u) in adapted.items() if each or s.name not in inputs}
        idle = [(n, s) for n, (s, u) in asked.items() if _effect(model, probe, whole, u) == 0]
    gather(EffectError, title, [_bypassed(name, site.name in inputs) for name, site in idle])


def _zero(name: str, update: Update) -> str | None:
    if isinstance(update, Network) and not (update.up.any() or update.up_bias.any()):
        return (
            f"'{name}': U and its bias are all zeros, so its bottleneck adds nothing. It was not "
            "trained, or no gradient reached it; train it, or leave its layer out."
        )
    if not isinstance(update, LowRank):
        return None
    factors = {"lora_A": update.lora_A, "lora_B": update.lora_B}
    starts = {"lora_A": update.start_A, "lora_B": update.start_B}
    zeros = [side for side, factor in factors.items() if not factor.detach().any()]
    same = [s for s, f in factors.items() if starts[s] is not None and torch.equal(f, starts[s])]  # type: ignore[arg-type]
    if not zeros and len(same) < 2:
        return None
    how = f"{' and '.join(zeros)} is all zeros" if zeros else "A and B are where they started"
    return (
        f"'{name}': {how}, so its update is zero. It was not "
        "trained, or no gradient reached it; train it, or leave it out of target_modules."
    )


def _bypassed(name: str, called: bool) -> str:
    how = (
        "what it computes does not reach the outputs"
        if called
        else "its forward was not called, and its owner does not read its weight either"
    )
    return (
        f"'{name}': the outputs on this probe are the same without its update; {how}. Leave it "
        "out of target_modules, or probe with inputs that need it."
    )


def _effect(model: nn.Module, probe: Probe, whole: Sequence[Tensor], update: Update) -> float:
    with _left_out(model, update):
        return difference(whole, outputs(model, probe))


@contextlib.contextmanager
def _left_out(model: nn.Module, update: Update) -> Generator[None]:
    """The model without one update, and without it where it is shared, for the block."""
    held = [m.updates for m in model.modules() if isinstance(m, LoRALayer)]
    before = [dict(updates.items()) for updates in held]
    for updates in held:
        for key, other in list(updates.items()):
            if other is update or (isinstance(other, Shared) and other.source is update):
                del updates[key]
    try:
        yield
    finally:
        for updates, those in zip(held, before, strict=True):
            updates.clear()
            updates.update(those)


@contextlib.contextmanager
def instead(places: Sequence[tuple[Site, nn.Module]]) -> Generator[None]:
    """Other modules in some places for the length of the block."""
    for site, module in places:
        site.put(module)
    try:
        yield
    finally:
        for site, _ in places:
            site.put(site.module)


@contextlib.contextmanager
def recorded_inputs(adapted: Sequence[tuple[Site, LoRALayer]]) -> Generator[dict[str, Tensor]]:
    """The input of the first call of each layer around another one, some of it, by name.

    Rows x (N, in), or ids (N,) for an embedding; at most :func:`row_limit` of them, evenly spread;
    for a convolution the first two of the batch. A layer whose ``forward`` is not called has no
    entry, and neither has a module whose parameters are adapted.
    """
    found: dict[str, Tensor] = {}
    around = [(s, layer) for s, layer in adapted if not isinstance(layer, LoRAHost)]
    hooks = [
        layer.register_forward_pre_hook(_recorder(s.name, found), with_kwargs=True)
        for s, layer in around
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _recorder(name: str, found: dict[str, Tensor]):
    def record(
        layer: LoRALayer, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]
    ) -> None:
        given = [*arguments, *keywords.values()]
        if name in found or not given:
            return
        x = given[0].detach()
        if isinstance(layer, LoRAConv):
            batched = x.ndim > len(layer.base_layer.kernel_size) + 1
            found[name] = (x[:2] if batched else x).clone()
            return
        rows = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
        limit = row_limit(layer)
        if len(rows) > limit:
            rows = rows[torch.linspace(0, len(rows) - 1, limit, device=rows.device).long()]
        if len(rows):
            found[name] = rows.clone()

    return record


def row_limit(layer: LoRALayer) -> int:
    """How many inputs a layer is measured on: 16 to 64, fewer the wider they are."""
    changes = [u.layout for u in layer.live() if isinstance(u, Change)]
    sizes = [layout for layout in changes if len(layout.shape) > 1]
    looked_up = isinstance(layer, LoRAEmbedding)
    wide = max((max(s.out_features, 1 if looked_up else s.in_features) for s in sizes), default=1)
    return max(16, min(64, 2**16 // wide))


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Generator[None]:
    """Every module of these in evaluation mode; afterwards each in the mode that it was in.

    Modes are set one by one, because a module's ``train`` and ``eval`` may do more than that.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Generator[None]:
    """Evaluation mode, no gradients, no autocast, and float32 products in full float32.

    All of it is put back as it was, each module's own mode too.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(full_float32())
        for kind in {p.device.type for p in model.parameters()}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(evaluating(model))
        yield


@contextlib.contextmanager
def full_float32() -> Generator[None]:
    """Matrix products of float32 in float32, not in the shorter TF32 or bfloat16."""
    cpu = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    places = (torch.backends.cuda.matmul, cpu)
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def outputs(model: nn.Module, probe: Probe) -> tuple[Tensor, ...]:
    """The floating-point outputs of one run, with the same random numbers in every run.

    Of a mapping (a transformers ModelOutput is one) that has ``logits`` those alone, else all its
    floating-point tensors; of a tuple or list its floating-point tensors.

    Raises:
        UserError: the model returned nothing of the kind.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        result = _run(model, probe)
    candidates: list[object] = [result]
    if isinstance(result, Mapping):
        candidates = [result["logits"]] if "logits" in result else list(result.values())
    elif isinstance(result, (tuple, list)):
        candidates = list(result)
    found = [t for t in candidates if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise UserError(
            f"{type(model).__name__} returned {type(result).__name__} without a floating-point "
            "tensor to compare; probe a model that returns a tensor, a tuple or a mapping of them."
        )
    return tuple(t.detach().clone() for t in found)


def _run(model: nn.Module, probe: Probe) -> object:
    if isinstance(probe, Tensor):
        return model(probe)
    if isinstance(probe, Mapping):
        return model(**probe)
    return model(*probe)


def difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """max |a - b| over all outputs; equal infinities differ by 0, and other shapes by infinity."""
    if [t.shape for t in some] != [t.shape for t in others]:
        return float("inf")
    largest = [0.0]
    for a, b in zip(some, others, strict=True):
        if a.numel():
            wide = torch.promote_types(a.dtype, torch.float32)
            apart = torch.where(a == b, 0.0, (a.to(wide) - b.to(wide)).abs())
            largest.append(float(apart.max()))
    return next((x for x in largest if x != x), max(largest))
