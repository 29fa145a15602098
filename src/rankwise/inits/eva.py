"""EVA: A starts as the directions in which the inputs of a layer vary most, B zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankwise.errors import UserError, gather
from rankwise.inits.geometry import input_rows, unwatchable
from rankwise.inits.place import Place, Start
from rankwise.inits.sketch import Sketch
from rankwise.inits.watching import Batch, batched, call, hooked, name_all, untouched

__all__ = ["EVA", "attention_mask"]


def attention_mask(batch: Batch) -> Tensor | None:
    """The batch's ``attention_mask`` (rows, tokens), 0 at padding; None where it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


@dataclass(frozen=True, eq=False)
class EVA:
    """A starts as the r principal directions of the inputs in a few batches, B zero.

    Formula: with X (N, in) the rows that reach the layer, less their mean, and X = U Σ Vᵀ,
    A = Vᵀ[:r]. Among all A with orthonormal rows it keeps most of the inputs' variance, and so
    gives B the strongest gradients.

    With ``rho`` above 1 the ranks are shared out anew: every layer offers its first ρ · r
    directions (rounded), each with the share of its layer's variance that it explains, and as many
    directions as there were ranks in all are taken, the largest shares first. Layers then start
    with other ranks than were asked for, and layers without any are left out.

    Attributes:
        batches: a few; each is called as ``model(**batch)``, ``model(*batch)`` or
            ``model(batch)``. Gone through once.
        rho: ρ, 1 or more.
        mask: which tokens of a batch count: a tensor (rows, tokens), or None for all. It is
            applied to inputs (rows, tokens, in), and inputs of other shapes are used whole.
        forward: how a batch is run.

    Source: Paischer et al. 2024, arXiv 2410.07170, section 3; docs/math.md (14).

    Raises:
        UserError: rho is not a finite number of 1 or more.
    """

    batches: Iterable[Batch] = field(repr=False)
    rho: float = 1.0
    mask: Callable[[Batch], Tensor | None] = field(default=attention_mask, repr=False)
    forward: Callable[[nn.Module, Batch], object] = field(default=call, repr=False)

    def __post_init__(self) -> None:
        rho = self.rho
        number = isinstance(rho, (int, float)) and not isinstance(rho, bool)
        if not number or not math.isfinite(rho) or rho < 1:
            raise UserError(f"EVA: rho must be a finite number of 1 or more, got {rho!r}.")

    def fit(self, model: nn.Module, places: Sequence[Place]) -> Mapping[str, Start]:
        """A and B of every place that gets a rank, by name. See :class:`Fitted`.

        Raises:
            UserError: a bank, an embedding, a layer that is never called or sees fewer directions
                than r; no batches; an empty batch, or inputs that are not finite.
        """
        gather(UserError, "EVA cannot start", [p for place in places for p in _problems(place)])
        if all(place.is_meta for place in places):
            return {place.name: Start(*place.zeros()) for place in places}
        watched = _Watched({place.name: _offer(place, self.rho) for place in places})
        with untouched(model), torch.no_grad(), hooked(places, watched.look):
            for number, batch in batched("EVA", self.batches, model):
                watched.begin(number, self.mask(batch))
                self.forward(model, batch)
        return self._shared_out(places, watched.sketches)

    def _shared_out(
        self, places: Sequence[Place], sketches: Mapping[str, Sketch]
    ) -> Mapping[str, Start]:
        missing = [place.name for place in places if place.name not in sketches]
        if missing:
            raise UserError(
                f"EVA never saw an input of {name_all(missing)}: the model did not call the "
                "module on these batches. Exclude it, or give batches that reach it."
            )
        found = {name: sketch.directions() for name, sketch in sketches.items()}
        if self.rho == 1:
            gather(UserError, "EVA saw too little", list(_short(places, found, sketches)))
            ranks = {place.name: place.r for place in places}
        else:
            ranks = _ranks(places, {name: share for name, (_, share) in found.items()}, self.rho)
        starts: dict[str, Start] = {}
        for place in places:
            r = ranks[place.name]
            if r:
                A = found[place.name][0][:r].to(device=place.device, dtype=place.dtype)
                B = torch.zeros(place.out_features, r, dtype=place.dtype, device=place.device)
                starts[place.name] = Start(A.contiguous(), B)
        return starts


class _Watched:
    """The sketches of all places, built up while the model runs."""

    def __init__(self, wanted: Mapping[str, int]) -> None:
        self.wanted = wanted
        self.sketches: dict[str, Sketch] = {}
        self.begin(0, None)

    def begin(self, number: int, mask: Tensor | None) -> None:
        """A new batch."""
        self.number, self.mask = number, mask
        self.memo: tuple[Tensor, int, int, Sketch | None, Sketch] | None = None

    def look(self, module: nn.Module, parts: Sequence[Place], x: Tensor, y: Tensor) -> None:
        for place in parts:
            self.sketches[place.name] = self._updated(module, place, x)

    def _updated(self, module: nn.Module, place: Place, x: Tensor) -> Sketch:
        """The place's sketch with x; what reads the same x with the same past shares the work."""
        old = self.sketches.get(place.name)
        # Twice what is asked for, so that what is cut off hardly reaches what is asked for.
        width = min(2 * self.wanted[place.name] + 8, place.in_features)
        if self.memo is not None:
            seen, version, kept, before, after = self.memo
            same = seen is x and version == x._version  # changed in place since?
            if same and kept == width and before is old:
                return after
        new = self._sketched(module, place, x, old, width)
        self.memo = (x, x._version, width, old, new)
        return new

    def _sketched(
        self, module: nn.Module, place: Place, x: Tensor, old: Sketch | None, width: int
    ) -> Sketch:
        kept = x
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            kept = x[self.mask.to(device=x.device, dtype=torch.bool)]
        rows = input_rows(module, kept).flatten(0, 1).to(place.dtype)
        if not len(rows):
            raise UserError(
                f"EVA: batch {self.number} brings no row to '{place.name}': it is empty, or its "
                "mask leaves nothing."
            )
        if not bool(torch.isfinite(rows).all()):
            raise UserError(
                f"EVA: in batch {self.number} the input of '{place.name}' is not finite. Look for "
                "broken rows in the batch, or for an overflow in the base."
            )
        return (old or Sketch.empty(rows)).updated(rows, width)


def _problems(place: Place) -> list[str]:
    reason = unwatchable(place)
    if reason is None and place.lookup:
        reason = (
            "an embedding's inputs are row numbers, which have no directions; put it in "
            "exclude_modules, or use another start"
        )
    if reason is None and place.r > place.in_features:
        reason = f"r = {place.r} is more than its {place.in_features} inputs"
    return [] if reason is None else [f"'{place.name}': {reason}."]


def _offer(place: Place, rho: float) -> int:
    """How many directions a place may get."""
    return max(place.r, min(round(place.r * rho), place.in_features, place.out_features))


def _short(
    places: Sequence[Place],
    found: Mapping[str, tuple[Tensor, Tensor]],
    sketches: Mapping[str, Sketch],
) -> Iterable[str]:
    for place in places:
        have = len(found[place.name][0])
        if have < place.r:
            yield (
                f"'{place.name}': the {sketches[place.name].count} rows in these batches vary in "
                f"{have} directions, and r = {place.r} asks for more. Give more batches, or a "
                "smaller r in rank_pattern."
            )


def _ranks(places: Sequence[Place], shares: Mapping[str, Tensor], rho: float) -> Mapping[str, int]:
    """How many directions each place gets of Σ r in all; equal shares by the order of places."""
    offers = [
        (-share, order, place.name)
        for order, place in enumerate(places)
        for share in shares[place.name][: _offer(place, rho)].tolist()
    ]
    ranks = dict.fromkeys(shares, 0)
    for _, _, name in sorted(offers)[: sum(place.r for place in places)]:
        ranks[name] += 1
    return ranks
