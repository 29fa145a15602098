"""Tensors that backward makes again from inputs that are kept anyway, in place of being kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rankwise.kernels.eager import is_eager, is_lowered

__all__ = ["Origin", "Recipe", "noted", "origin_of", "recomputed"]

Function = Callable[..., Tensor]


def recomputed(function: Function, *inputs: Tensor) -> Tensor:
    """function(*inputs), of which only the inputs are kept for backward: it runs again there.

    The result is the function's own bit for bit, and so is the gradient of each input as long as
    the function reads it once, or nobody else does; else the gradients are added in another order.
    The function must be deterministic and write into nothing. Parameters that it reads are given
    among the inputs, whether or not it takes them from there, so that a write is noticed. The
    second run has the autocast of the first. Where nothing needs a gradient, in torch.func and
    while torch.compile traces, this is the function alone.

    A layer that reads the result may make it again as well, see :func:`origin_of`; the function
    runs once more for all of them together.
    """
    if not _counts(inputs):
        return function(*inputs)
    recipe = Recipe(function, inputs)
    recipe.readers += 1  # its own backward
    made: Tensor = _Recomputed.apply(recipe, *inputs)
    _note(made, recipe, inputs)
    return made


def noted(function: Function, *inputs: Tensor) -> Tensor:
    """function(*inputs) as autograd runs it, for a function that keeps no more than its inputs.

    As in :func:`recomputed`, layers that read the result may make it again from them.
    """
    made = function(*inputs)
    if _counts(inputs):
        _note(made, Recipe(function, inputs), inputs)
    return made


def _counts(inputs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs) and is_eager()


class Recipe:
    """How a tensor is made: by a function, under the autocast of its first run.

    It holds no tensors but those of the second run, from the first that asks to the last.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self.function = function
        self.kind = inputs[0].device.type
        self.lowered = torch.get_autocast_dtype(self.kind) if is_lowered(self.kind) else None
        self.readers = 0  # that will ask in a backward through all of them
        self._asked = 0
        self._made: tuple[Tensor, list[Tensor]] | None = None

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The result, as a function of these inputs."""
        with self._autocast():
            return self.function(*inputs)

    def again(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The result and what it is differentiated by: copies of the inputs that share their data.

        It is made once for all readers.
        """
        made = self._made
        if made is None:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
                made = self.run(leaves), leaves
        self._asked += 1
        if self._asked < self.readers:
            self._made = made
        else:
            self.forget()
        return made

    def forget(self) -> None:
        """Let go of the second run."""
        self._made, self._asked = None, 0

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.lowered is not None:
            return torch.autocast(self.kind, self.lowered)
        return torch.autocast(self.kind, enabled=False) if is_lowered(self.kind) else nullcontext()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(*inputs)
        return recipe.function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        if twice := torch.is_grad_enabled():  # then the result is a function of the inputs again
            leaves = [t.view_as(t) for t in inputs]  # each for itself, where one made the other
            made = recipe.run(leaves)
        else:
            made, leaves = recipe.again(inputs)
            recipe.forget()  # the graph of this run is spent
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        found = torch.autograd.grad(
            made, [leaves[i] for i in wanted], grads, create_graph=twice, allow_unused=True
        )
        by_input = dict(zip(wanted, found, strict=True))
        return None, *(by_input.get(i) for i in range(len(inputs)))


class Origin(NamedTuple):
    """What a tensor was made of: the recipe, and its inputs, which are kept for backward anyway."""

    recipe: Recipe
    inputs: tuple[Tensor, ...]


class _Note(NamedTuple):
    origin: Origin
    versions: tuple[int, ...]


# Beside the tensors and not in them, as attributes would be pickled with a tensor.
_notes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def origin_of(made: Tensor) -> Origin | None:
    """How to make a tensor again in backward, to keep what it was made of in its place.

    None where it is not known, and where it or an input of it was written since. Whoever will ask
    for it counts as one of the recipe's ``readers``.
    """
    note: _Note | None = _notes.get(made)
    if note is None or note.versions != _versions(made, note.origin.inputs):
        return None
    return note.origin


def _note(made: Tensor, recipe: Recipe, inputs: tuple[Tensor, ...]) -> None:
    if made.requires_grad:
        _notes[made] = _Note(Origin(recipe, inputs), _versions(made, inputs))


def _versions(made: Tensor, inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    return made._version, *(t._version for t in inputs)
