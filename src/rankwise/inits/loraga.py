"""LoRA-GA: A and B start along the gradient that full fine-tuning would have at step 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import UserError, gather
from rankwise.inits.geometry import unwatchable, weight_gradient
from rankwise.inits.place import Place, Start
from rankwise.inits.spectral import check_iterations, leading
from rankwise.inits.watching import Batch, batched, call, hooked, name_all, untouched

__all__ = ["LoRAGA", "model_loss"]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The ``loss`` that a model of transformers gives when its batch has labels.

    Raises:
        UserError: the output has none.
    """
    output = call(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UserError(
            f"LoRA-GA needs a loss, and {type(model).__name__} gave none for this batch. Put "
            "'labels' into the batch, or say LoRAGA(..., loss=lambda model, batch: ...)."
        )
    return loss


@dataclass(frozen=True, eq=False)
class LoRAGA:
    """A and B start along the leading singular vectors of the loss's gradient with respect to W0.

    Formula: with G = ∂L/∂W0 = U Σ Vᵀ over a few batches and c = out^¼ / √γ, A0 = c · Vᵀ[:r] and
    B0 = c · U[:, r:2r]; δ = s · (B A − B0 A0). Of all starts of this size the first step of
    gradient descent then changes W most nearly as full fine-tuning would.

    The gradients come from the layers' inputs and the gradients of their outputs, so a frozen or
    quantised base will do, and ``requires_grad`` and ``grad`` of its parameters are never touched.
    They are held for all places at once, out · in numbers each. The model runs in evaluation
    mode, without dropout.

    Attributes:
        batches: a few. Gone through once; the losses are summed.
        loss: what is to be minimised, a scalar of the model and a batch; without it the model's
            own (:func:`model_loss`).
        gamma: γ, above 0; the larger, the smaller the start.
        iterations: power iterations of the randomised decomposition, None for the exact one.

    Source: Wang, Yu and Li 2024, arXiv 2407.05000, sections 3.2 and 3.3, and the authors' own
    code, which scales both factors; PEFT 0.21 scales B alone, by c and by the singular values.
    docs/math.md (15).

    Raises:
        UserError: gamma is not a finite number above 0, or iterations no whole number.
    """

    batches: Iterable[Batch] = field(repr=False)
    loss: Callable[[nn.Module, Any], Tensor] = field(default=model_loss, repr=False)
    gamma: float = 16.0
    iterations: int | None = 4

    def __post_init__(self) -> None:
        gamma = self.gamma
        number = isinstance(gamma, (int, float)) and not isinstance(gamma, bool)
        if not number or not math.isfinite(gamma) or gamma <= 0:
            raise UserError(f"LoRA-GA: gamma must be a finite number above 0, got {gamma!r}.")
        check_iterations("LoRA-GA", self.iterations)

    def fit(self, model: nn.Module, places: Sequence[Place]) -> Mapping[str, Start]:
        """A and B of every place, by name. See :class:`Fitted`.

        Raises:
            UserError: a bank; a layer whose smaller side is below 2r, that is never called, or on
                which the loss does not depend; no batches; a loss that is missing, not finite or
                not one number.
        """
        gather(UserError, "LoRA-GA cannot start", [p for place in places for p in _problems(place)])
        if all(place.is_meta for place in places):
            return {place.name: Start(*place.zeros(), subtract=True) for place in places}
        gradients = self._gradients(model, places)
        idle = [p.name for p in places if not bool(gradients[p.name].any())]
        if idle:
            raise UserError(
                f"LoRA-GA: on these batches the loss does not change with {name_all(idle)}. "
                "Exclude what it does not depend on, give batches that reach it, and compute the "
                "loss with gradients (no detach, no_grad or item)."
            )
        return {place.name: self._start(place, gradients[place.name]) for place in places}

    def _gradients(self, model: nn.Module, places: Sequence[Place]) -> Mapping[str, Tensor]:
        """Σ ∂L/∂W over the batches, by place."""
        summed: dict[str, Tensor] = {}
        anchor = torch.zeros((), requires_grad=True)

        def look(module: nn.Module, parts: Sequence[Place], x: Tensor, y: Tensor) -> Tensor | None:
            def note(x: Tensor, g: Tensor) -> None:
                whole = weight_gradient(module, x, g, parts[0].dtype)
                for place in parts:
                    part = whole if place.rows is None else whole[_index(place.rows)]
                    summed[place.name] += part

            for place in parts:
                if place.name not in summed:
                    summed[place.name] = torch.zeros(
                        place.out_features, place.in_features, dtype=place.dtype, device=y.device
                    )
            return _tap(y, anchor, x, note) if torch.is_grad_enabled() else None

        with untouched(model), torch.enable_grad(), hooked(places, look):
            for number, batch in batched("LoRA-GA", self.batches, model):
                loss = self.loss(model, batch)
                _check_loss(loss, number)
                if loss.requires_grad:  # the loop's end tells what it does not depend on
                    torch.autograd.grad(loss, anchor, allow_unused=True)
        missing = [place.name for place in places if place.name not in summed]
        if missing:
            raise UserError(
                f"LoRA-GA never saw an input of {name_all(missing)}: the model did not call the "
                "module on these batches. Exclude it, or give batches that reach it."
            )
        broken = [name for name, g in summed.items() if not bool(torch.isfinite(g).all())]
        if broken:
            raise UserError(f"LoRA-GA: the gradient of {name_all(broken)} is not finite.")
        return summed

    def _start(self, place: Place, gradient: Tensor) -> Start:
        generator = torch.Generator(gradient.device).manual_seed(0)
        u, _, vh = leading(gradient, 2 * place.r, self.iterations, generator)
        size = place.out_features**0.25 / math.sqrt(self.gamma)
        A, B = size * vh[: place.r], size * u[:, place.r :]
        return Start(A.to(place.device).contiguous(), B.to(place.device).contiguous(), True)


class _Tap(torch.autograd.Function):
    """y as it is; in backward, x and the gradient of y are handed over.

    ``_anchor`` is a leaf that asks for a gradient, so that backward comes by even where nothing in
    the model asks for one. x is kept the way autograd keeps what it needs, and so is known to be
    unchanged when it is read.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, _anchor: Tensor, x: Tensor, note: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.note = note
        return y.clone()  # not y itself, which the next module may change in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.note(x, grad_outputs[0])
        return grad_outputs[0], torch.zeros(()), None, None


def _tap(y: Tensor, anchor: Tensor, x: Tensor, note: Callable[[Tensor, Tensor], None]) -> Tensor:
    tapped = _Tap.apply(y, anchor, x, note)
    assert isinstance(tapped, Tensor)
    return tapped


def _index(rows: tuple[int, ...] | slice) -> slice | list[int]:
    return rows if isinstance(rows, slice) else list(rows)


def _problems(place: Place) -> list[str]:
    reason = unwatchable(place)
    most = min(place.out_features, place.in_features) // 2
    if reason is None and place.r > most:
        reason = (
            f"it takes 2r directions of a gradient of {place.out_features} by "
            f"{place.in_features}, so r may be {most} at most, got {place.r}"
        )
    return [] if reason is None else [f"'{place.name}': {reason}."]


def _check_loss(loss: object, number: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"LoRA-GA: the loss of batch {number} must be one number, got {got}.")
    if not bool(torch.isfinite(loss)):
        raise UserError(
            f"LoRA-GA: the loss of batch {number} is {float(loss.detach())}. Look for broken rows "
            "in the batch, or for an overflow in the base."
        )
