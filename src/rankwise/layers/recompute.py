"""recompute_activations, keep_activations: what a backward makes again, in place of keeping it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rankwise.layers.recomputing import (
    Gated,
    Keeps,
    Single,
    gated_form,
    is_recomputing,
    keeps,
    numbers,
)

__all__ = ["Recomputation", "keep_activations", "recompute_activations"]

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


@dataclass(frozen=True)
class Recomputation:
    """What :func:`recompute_activations` found, by the names of the modules.

    Attributes:
        norms: their outputs, and what they keep beside their inputs.
        activations: their outputs, and what they keep beside their inputs.
        gated: MLPs whose product of activation and gate is made again.
    """

    norms: tuple[str, ...]
    activations: tuple[str, ...]
    gated: tuple[str, ...]


def recompute_activations(model: nn.Module) -> Recomputation:
    """Keep fewer tensors for backward: outputs of elementwise functions are made again there.

    A norm's output is made again from its input, an activation's from its own, and a gated MLP's
    act(g) ∘ u from g and u, which are kept anyway. Adapted linear layers that read them make their
    x again as well, together in one more run. No matrix product is computed twice. Outputs and
    gradients are the same bit for bit. docs/math.md (6) counts the bytes.

    What qualifies is found by trying, not by the names of models: frozen norms and activations that
    keep their input, or more, and whose second run gives the same bits; MLPs that compute
    down_proj(act(gate) ∘ up) and nothing else. Others, those whose parameters train, and modules
    with a forward of their own are left alone. Parameters, state dict, classes, hooks and adapters
    stay as they are. A module whose parameters begin to train later computes plainly from then on;
    so do all while torch.compile traces, which recomputes by itself.

    Call it when the model has its number format, which decides what a norm keeps; before or after
    :func:`rankwise.attach`; and again where either has changed. :func:`keep_activations` is the
    inverse. nn.DataParallel, which copies modules to devices at every call, is not served.
    """
    keep_activations(model)
    gated = [name for name, module in model.named_modules() if _make_gated(module)]
    inside = {id(m) for name in gated for m in model.get_submodule(name).children()}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    norms: list[str] = []
    activations: list[str] = []
    for name, module in model.named_modules():
        if id(module) in inside or not _is_alone(module):
            continue
        if type(module).__name__.endswith("Norm"):
            if _make_norm(module):
                norms.append(name)
        elif type(module).__module__ in _ACTIVATIONS and not [*module.parameters()]:
            made = keeps(module, numbers(8, 32).to(dtype), shared=False)
            if made is not Keeps.OTHER:
                module.forward = Single(module, made is Keeps.MORE)
                activations.append(name)
    return Recomputation(tuple(norms), tuple(activations), tuple(gated))


def keep_activations(model: nn.Module) -> int:
    """Let every module keep for backward what it did before; how many were recomputing."""
    found = [module for module in model.modules() if is_recomputing(module)]
    for module in found:
        del module.forward
    return len(found)


def _is_alone(module: nn.Module) -> bool:
    """Whether a module has no submodules, no state and no forward of its own."""
    return not ([*module.children(), *module.buffers()] or "forward" in vars(module))


def _make_gated(module: nn.Module) -> bool:
    form = None if "forward" in vars(module) else gated_form(module)
    if form is not None:
        module.forward = Gated(module, form)
    return form is not None


def _make_norm(module: nn.Module) -> bool:
    """Let a norm recompute, where it is frozen and that keeps less."""
    held = [*module.parameters()]
    if not held or any(p.requires_grad or not p.ndim for p in held):
        return False
    x = numbers(8, held[0].shape[-1]).to(held[0].dtype)
    made = keeps(module, x, shared=True)
    if made is not Keeps.OTHER:
        module.forward = Single(module, made is Keeps.MORE)
    return made is not Keeps.OTHER
