"""The loss of a language model: of its targets alone and in chunks, so that no logits are held."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.data.encode import Encoded
from rankwise.data.language import IGNORED
from rankwise.layers import Shared
from rankwise.merging.effect import evaluating
from rankwise.targets import is_transformers

__all__ = ["POSITIONS", "positions", "row_losses", "see_output", "summed_loss", "summed_losses"]

POSITIONS = "rankwise_positions"
"""The key of a batch with the places of its targets, which are looked for where it is missing."""

_BYTES = 2**26  # of the float32 logits that are there at a time
_ACCELERATOR_BYTES = 2**28  # whose products want more rows
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def positions(encoded: Encoded, indices: list[int], length: int) -> list[int]:
    """Where the targets of these rows are among (rows, length - 1) predictions, row after row.

    A target is a label that is not -100; nothing predicts the first token of a row.
    """
    labels: Any = encoded.labels
    return [
        row * (length - 1) + place
        for row, i in enumerate(indices)
        for place, label in enumerate(labels[i][1:])
        if label != IGNORED
    ]


def row_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of each row the sum of its targets' cross-entropies given the tokens before, (rows,).

    ``batch`` is what the model takes, labels (rows, length), which are -100 where there is no
    target, and may have ``POSITIONS`` (targets,); the losses are float32.
    """
    rows, length = batch["labels"].shape
    at = _targets(batch)
    found = _predictions(model, batch, at)
    each = torch.zeros(rows * (length - 1), device=found.states.device)
    for part in found.chunks():
        losses = F.cross_entropy(
            found.logits(found.states[part]), found.goals[part], reduction="none"
        )
        each[at[part]] = losses
    return each.view(rows, -1).sum(dim=1)


def summed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of :func:`row_losses`, with its gradient.

    The gradients by what goes into the output layer, (targets, width), and by what trains in that
    layer are computed with each chunk of the logits and kept for backward; the chunk is let go.
    Where the output layer's whole weight trains, or where the model does more to its logits, those
    of all targets are held at once.
    """
    return _sum(_predictions(model, batch, _targets(batch)))


def summed_losses(model: nn.Module, batch: Mapping[str, Tensor], parts: int) -> Tensor:
    """The :func:`summed_loss` of each of so many parts of a batch, (parts,).

    The parts lie one after the other and are of as many rows and targets each.
    """
    found = _predictions(model, batch, _targets(batch))
    both = zip(found.states.tensor_split(parts), found.goals.tensor_split(parts), strict=True)
    return torch.stack([_sum(replace(found, states=s, goals=g)) for s, g in both])


def _sum(found: _Predictions) -> Tensor:
    trained = [] if found.head is None else _trained(found.head)
    width = found.states.shape[-1]
    if found.head is None or any(p.numel() >= found.vocabulary * width for p in trained):
        return F.cross_entropy(found.logits(found.states), found.goals, reduction="sum")
    return _SummedLoss.apply(found.states, found, *trained)


@dataclass(frozen=True)
class _Predictions:
    """Where targets follow: what goes into the output layer, or without one the logits.

    Shapes: states (targets, width), goals (targets,).
    """

    states: Tensor
    goals: Tensor
    head: nn.Module | None
    vocabulary: int

    def logits(self, states: Tensor) -> Tensor:
        """Logits of some states, (n, vocabulary), in float32."""
        return (states if self.head is None else self.head(states)).float()

    def chunks(self) -> Iterator[slice]:
        """All targets, so many at a time that their logits stay small."""
        most = _BYTES if self.states.device.type == "cpu" else _ACCELERATOR_BYTES
        size = max(64, most // (4 * self.vocabulary))
        return (slice(first, first + size) for first in range(0, len(self.states), size))


def _trained(head: nn.Module) -> list[nn.Parameter]:
    """What trains in an output layer, and in an update that it shares with the embedding."""
    owners = [m.source if isinstance(m, Shared) else m for m in head.modules()]
    held = dict.fromkeys(p for owner in owners for p in owner.parameters(recurse=False))
    return [parameter for parameter in held if parameter.requires_grad]


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, found: _Predictions, *trained: nn.Parameter) -> Tensor:
        total = torch.zeros((), device=states.device)
        need: bool = ctx.needs_input_grad[0]
        by_state = torch.empty_like(states) if need else None
        by_parameter = [torch.zeros_like(p) for p in trained]
        for part in found.chunks():
            inputs = states[part].detach().requires_grad_(need)
            with torch.enable_grad():
                loss = F.cross_entropy(found.logits(inputs), found.goals[part], reduction="sum")
            total += loss.detach()
            grads = torch.autograd.grad(loss, [inputs, *trained] if need else trained)
            if by_state is not None:
                by_state[part] = grads[0]
            for kept, grad in zip(by_parameter, grads[need:], strict=True):
                kept += grad
        ctx.save_for_backward(by_state, *by_parameter)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        by_state, *by_parameter = (
            None if kept is None else kept * grads[0].to(kept.dtype) for kept in ctx.saved_tensors
        )
        return by_state, None, *by_parameter


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    there = batch.get(POSITIONS)
    return (batch["labels"][:, 1:].flatten() != IGNORED).nonzero()[:, 0] if there is None else there


def _predictions(model: nn.Module, batch: Mapping[str, Tensor], at: Tensor) -> _Predictions:
    inputs = _inputs(batch)
    head = _output_layer(model, inputs)
    if head is None:
        states: Tensor = model(**inputs).logits
        vocabulary = states.shape[-1]
    else:
        with _cut(head) as seen:
            model(**inputs)
        states, vocabulary = seen["input"], seen["output"].shape[-1]
    states = states[:, :-1].flatten(0, 1).index_select(0, at)
    goals = batch["labels"][:, 1:].flatten().index_select(0, at)
    return _Predictions(states, goals, head, vocabulary)


def see_output(model: nn.Module, batch: Mapping[str, Tensor]) -> nn.Module | None:
    """Find out how a model makes its logits, which later calls know; its plain output layer.

    It is for callers who let the rows of later batches go through different adapters: what is tried
    here has rows of its own.
    """
    return _output_layer(model, _inputs(batch))


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in ("labels", POSITIONS)}


def _output_layer(model: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module | None:
    """The output layer of a model whose logits are what that layer makes, and nothing is done to.

    Some models scale or bound their logits; this is seen in what they do with two tokens. One that
    cannot do without logits is none of these either.
    """
    if not is_transformers(model):
        return None
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return None
    if model not in _plain:
        few = {name: value[:1, :2] for name, value in inputs.items()}
        _plain[model] = False
        with (
            contextlib.suppress(IndexError, RuntimeError, ValueError),
            torch.no_grad(),
            evaluating(model),
            _cut(head) as seen,
        ):
            _plain[model] = model(**few).logits is seen.get("output")
    return head if _plain[model] else None


@contextlib.contextmanager
def _cut(head: nn.Module) -> Generator[dict[str, Tensor]]:
    """Let an output layer see no tokens; what it would have seen and what it makes are noted."""
    seen: dict[str, Tensor] = {}

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["input"] = args[0]
        return (args[0][:, :0], *args[1:])

    def after(_: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["output"] = output

    hooks = head.register_forward_pre_hook(before), head.register_forward_hook(after)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
