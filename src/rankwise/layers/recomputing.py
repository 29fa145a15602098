"""Modules whose outputs are made again in backward: norms, activations, and gated products."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.kernels import noted, recomputed

__all__ = ["GATED", "Gated", "Keeps", "Single", "gated_form", "is_recomputing", "keeps"]

_FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_SCALES = (1e-3, 1.0, 30.0, 1e3)  # of the numbers of a trial: bounds inside a function show


class Single:
    """What stands for the ``forward`` of a norm or an activation: its own, noted or recomputed.

    Args:
        module: with no submodules.
        whole: whether nothing but the input is kept, and the module runs again for its own
            gradient; else it keeps what it does, and its output can be made again for others.
    """

    def __init__(self, module: nn.Module, whole: bool) -> None:
        self.module = module
        self.whole = whole

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inside = vars(self.module)
        held = {name: p for name, p in inside["_parameters"].items() if p is not None}
        trains = any(p.requires_grad for p in held.values())
        if kwargs or len(args) != 1 or trains or inside["_forward_hooks"]:
            return type(self.module).forward(self.module, *args, **kwargs)
        own = functools.partial(_with_parameters, self.module, tuple(held))
        return (recomputed if self.whole else noted)(own, *args, *held.values())

    def __reduce__(self) -> tuple[object, ...]:
        return Single, (self.module, self.whole)


def _with_parameters(
    module: nn.Module, names: Sequence[str], x: Tensor, *parameters: Tensor
) -> Tensor:
    """The module's forward with these parameters, which may be its own no longer."""
    held = vars(module)["_parameters"]
    if any(held.get(name) is not p for name, p in zip(names, parameters, strict=True)):
        module = copy.copy(module)
        vars(module)["_parameters"] = {**held, **dict(zip(names, parameters, strict=True))}
    return type(module).forward(module, x)


@dataclass(frozen=True)
class Form:
    """How a gated MLP calls its parts: y = down_proj(act(g) ∘ u).

    ``sources`` are the layers whose outputs are g and u, or the one whose output is both.
    """

    sources: tuple[str, ...]
    act: str


GATED = (
    Form(("gate_proj", "up_proj"), "act_fn"),  # Llama, Mistral, Qwen, Gemma
    Form(("gate_up_proj",), "activation_fn"),  # Phi-3, GLM
)


class Gated:
    """What stands for the ``forward`` of a gated MLP: g and u are kept, act(g) ∘ u made again."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        self.module = module
        self.form = form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner: dict[str, nn.Module] = vars(self.module)["_modules"]
        act = vars(inner[self.form.act])
        if kwargs or len(args) != 1 or act["_forward_hooks"] or act["_forward_pre_hooks"]:
            return type(self.module).forward(self.module, *args, **kwargs)
        made = [inner[name](*args) for name in self.form.sources]
        return inner["down_proj"](recomputed(self._product, *made))

    def _product(self, *made: Tensor) -> Tensor:
        gate, up = made if len(made) == 2 else made[0].chunk(2, dim=-1)
        return vars(self.module)["_modules"][self.form.act](gate) * up

    def __reduce__(self) -> tuple[object, ...]:
        return Gated, (self.module, self.form)


def is_recomputing(module: nn.Module) -> bool:
    """Whether a module computes through one of these."""
    return type(vars(module).get("forward")) in (Single, Gated)


def gated_form(module: nn.Module) -> Form | None:
    """The form of a gated MLP, or None where a module is none or does more.

    It has the parts of a form and nothing else, and its own forward is the form's bit for bit on
    small layers in the place of its own, for inputs of several shapes and sizes.
    """
    parts = dict(module.named_children())
    for form in GATED:
        if parts.keys() == {*form.sources, "down_proj", form.act}:
            act = parts[form.act]
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            own += [*act.parameters(), *act.buffers()]
            return form if not own and _is_gated(module, form, act) else None
    return None


def _is_gated(module: nn.Module, form: Form, act: nn.Module) -> bool:
    both = 2 // len(form.sources)
    small = copy.copy(module)
    parts = {name: _linear(3, both * 4, i) for i, name in enumerate(form.sources)}
    vars(small)["_modules"] = {**parts, "down_proj": _linear(4, 3, 2), form.act: act}
    own = type(small).forward.__get__(small)
    for training in (True, False):
        vars(small)["training"] = training
        for shape in ((3,), (5, 3), (2, 5, 3)):
            for scale in _SCALES:
                x = scale * numbers(*shape)
                wanted, found = _run(own, x), _run(Gated(small, form), x)
                if not (isinstance(wanted, Tensor) and torch.equal(found, wanted)):
                    return False
    return True


class Keeps(Enum):
    """What a module of one input keeps for backward."""

    INPUT = "its input"
    MORE = "more than its input"
    OTHER = "something else, as its output"


def keeps(module: nn.Module, x: Tensor, shared: bool) -> Keeps:
    """What a module keeps of an input x like its own; OTHER also where it can't be run again.

    It can where it gives a tensor of x's shape and dtype, the same one each time, also in training
    mode, and, where it keeps more than x, the gradient of a second run is the same bit for bit.
    Numbers on the CPU stand for its parameters, so that they may be anywhere.

    Args:
        shared: whether x is read by others beside the module, as a norm's is.
    """
    twin = copy.copy(module)
    twin.training = True
    vars(twin)["_parameters"] = {
        name: p if p is None else nn.Parameter(numbers(*p.shape).to(p.dtype), requires_grad=False)
        for name, p in vars(module)["_parameters"].items()
    }
    own = type(twin).forward.__get__(twin)
    x = x.clone().requires_grad_()
    held = {p.untyped_storage().data_ptr() for p in twin.parameters()}
    sizes: dict[int, tuple[int, Tensor]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        sizes[storage.data_ptr()] = (storage.nbytes(), saved)
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = _run(own, x)
    if not isinstance(y, Tensor) or (y.shape, y.dtype) != (x.shape, x.dtype) or x._version:
        return Keeps.OTHER
    if not y.requires_grad:
        return Keeps.OTHER
    at_x, at_y = (t.untyped_storage().data_ptr() for t in (x, y))
    large = {at for at, (size, _) in sizes.items() if size > x.nbytes // 2} - held
    with torch.enable_grad():
        again = recomputed(own, x)
    if len(large | {at_y}) < 2 or not torch.equal(y, again):
        return Keeps.OTHER
    if large <= {at_x}:
        return Keeps.INPUT
    with torch.enable_grad():
        both = [t + x if shared else t for t in (y, again)]
    dx = [torch.autograd.grad(t, x, numbers(*x.shape).to(x))[0] for t in both]
    return Keeps.MORE if torch.equal(*dx) else Keeps.OTHER


def numbers(*shape: int, start: int = 1) -> Tensor:
    """Numbers between -3 and 3, drawn from no generator: 3 sin of start, start + 1, ..."""
    count = torch.Size(shape).numel()
    return 3 * torch.arange(start, start + count, device="cpu").sin().reshape(shape)


def _linear(width: int, out: int, which: int) -> nn.Linear:
    """A small layer; one with another number has another weight."""
    layer = nn.Linear(width, out, bias=False, device="meta")
    layer.weight = nn.Parameter(numbers(out, width, start=100 * which + 10), requires_grad=False)
    return layer


def _run(function: Callable[..., Any], x: Tensor) -> Any:
    try:
        return function(x)
    except _FAULTS:
        return None
