"""What the updates of a model do to its outputs on a probe, all together and one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rankwise.attaching import adapted_sites, base, unmerged
from rankwise.errors import RankwiseError, UserError, gather
from rankwise.layers import LoRAEmbedding, LoRALayer
from rankwise.targets import Site

__all__ = ["EffectError", "Probe", "check_effect", "effects"]

Probe = Tensor | Sequence[object] | Mapping[str, object]
"""What a model is run on: one tensor, positional inputs, or inputs by keyword."""


class EffectError(RankwiseError):
    """An update that was attached does nothing: it did not train, or its owner passes it by."""

    exit_code = 3


def effects(model: nn.Module, probe: Probe) -> dict[str, float]:
    """How much each update matters: max |y - y_i|, with y_i the outputs without update i.

    One run of the model, and one more for each adapted layer, in evaluation mode; the model is
    left as it was. The outputs are compared as :func:`outputs` reads them.

    Raises:
        UserError: the model carries no adapter, it is merged, or its outputs hold no numbers.
    """
    unmerged(model)
    with at_rest(model):
        whole = outputs(model, probe)
        return {
            site.name: _effect(model, probe, whole, site, layer)
            for site, layer in adapted_sites(model)
        }


def check_effect(model: nn.Module, probe: Probe | None = None, *, each: bool = False) -> None:
    """Refuse an adapter of which a part does nothing, naming the layers.

    Without a probe, an update counts as nothing when A or B is all zeros: it got no gradient.
    With a probe, the outputs must change when the adapter is taken away as a whole (two runs),
    and when the update of any layer whose ``forward`` was not called is taken away (one run for
    each such layer): its owner may read ``.weight``, which is fine, or hold on to a weight of its
    own. ``each`` asks the same of every layer, at one run for each. Methods without low-rank
    updates have nothing to check.

    Raises:
        EffectError: names every layer without effect.
        UserError: the model carries no adapter, it is merged, or its outputs hold no numbers.
    """
    unmerged(model)
    adapted = adapted_sites(model)
    title = "The adapter has no effect in part"
    gather(EffectError, title, [p for site, layer in adapted if (p := _zero(site, layer))])
    if probe is None or not adapted:
        return
    with at_rest(model):
        with recorded_inputs(adapted) as inputs:
            whole = outputs(model, probe)
        with base(model):
            without = outputs(model, probe)
        if difference(whole, without) == 0:
            raise EffectError(
                f"The outputs of {type(model).__name__} are the same with the adapter and without "
                f"it on this probe, though {len(adapted)} layer(s) carry an update, the first "
                f"being '{adapted[0][0].name}'. The outputs do not depend on these layers: adapt "
                "layers that they pass through, or probe with inputs that reach them."
            )
        asked = [(s, m) for s, m in adapted if each or s.name not in inputs]
        idle = [s.name for s, m in asked if _effect(model, probe, whole, s, m) == 0]
    gather(EffectError, title, [_bypassed(name, name in inputs) for name in idle])


def _zero(site: Site, layer: LoRALayer) -> str | None:
    factors = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    zeros = [name for name, factor in factors.items() if not factor.detach().any()]
    if not zeros:
        return None
    return (
        f"'{site.name}': {' and '.join(zeros)} is all zeros, so its update is zero. It was not "
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


def _effect(
    model: nn.Module, probe: Probe, whole: Sequence[Tensor], site: Site, layer: LoRALayer
) -> float:
    with instead([(site, layer.base_layer)]):
        return difference(whole, outputs(model, probe))


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
    """The input of the first call of each adapted layer, some of its rows, by name.

    Rows x (N, in), or ids (N,) for an embedding; at most :func:`row_limit` of them, evenly spread.
    A layer whose ``forward`` is not called has no entry.
    """
    found: dict[str, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(_recorder(s.name, found)) for s, layer in adapted]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _recorder(name: str, found: dict[str, Tensor]):
    def record(layer: LoRALayer, arguments: tuple[Tensor, ...]) -> None:
        if name in found or not arguments:
            return
        x = arguments[0].detach()
        rows = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
        limit = row_limit(layer)
        if len(rows) > limit:
            rows = rows[torch.linspace(0, len(rows) - 1, limit, device=rows.device).long()]
        if len(rows):
            found[name] = rows.clone()

    return record


def row_limit(layer: LoRALayer) -> int:
    """How many inputs a layer is measured on: 16 to 64, fewer the wider they are."""
    r, out_features = layer.lora_A.shape[0], layer.lora_B.shape[0]
    looked_up = isinstance(layer, LoRAEmbedding)
    wide = max(out_features, r if looked_up else layer.lora_A.shape[1])
    return max(16, min(64, 2**16 // wide))


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Generator[None]:
    """Evaluation mode, no gradients, no autocast, and float32 products in full float32.

    All of it is put back as it was, each module's own mode too.
    """
    modes = [(module, module.training) for module in model.modules()]
    kinds = {p.device.type for p in model.parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(full_float32())
        for kind in kinds:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


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
