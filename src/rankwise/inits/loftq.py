"""LoftQ: A and B start as what quantisation took from the weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankwise.errors import UserError, nearest
from rankwise.inits.place import Place, Start
from rankwise.inits.spectral import balanced, check_iterations, check_rank, dense, leading

__all__ = ["LoftQ"]


@dataclass(frozen=True, eq=False)
class LoftQ:
    """A and B start as the best correction of rank r of a quantised weight.

    Formula: s · B A is the best approximation of rank r of W − Q, where Q is the quantised weight
    of the base and W the one it was made from. δ = s · B A acts from the first step: unlike every
    other start, step 0 is on purpose not the (quantised) base but nearer to the model before
    quantisation. Where Q = W the start is Kaiming's.

    The paper alternates between quantising W − s · B A and this step. The base is given here and
    never written, so it is the second step of that loop, once.

    Attributes:
        weights: the model before quantisation, or its tensors by parameter name (as its
            ``state_dict`` or a safetensors file has them) or by adapted name. Whether one is
            stored as (in, out) is seen from which way round it is near to Q.
        iterations: None for the exact decomposition, or power iterations as in PiSSA.

    Source: Li et al. 2023, arXiv 2310.08659, section 3; docs/math.md (13).

    Raises:
        UserError: iterations is not a whole number of 0 or more.
    """

    weights: Mapping[str, Tensor] | nn.Module = field(repr=False)
    iterations: int | None = None

    def __post_init__(self) -> None:
        check_iterations("LoftQ", self.iterations)

    def start(self, place: Place, generator: torch.Generator | None = None) -> Start:
        """The correction of one place.

        Raises:
            UserError: r is above the smaller side of W0; ``weights`` does not hold this weight, or
                holds one of another shape, not finite, or from which Q cannot have been made.
        """
        check_rank("LoftQ", place, place.r)
        if place.is_meta:
            return Start(*place.zeros())
        lost = self._lost(place)
        triples = leading(lost, place.r, self.iterations, generator)
        return Start(*balanced(place, *triples, generator))

    def _lost(self, place: Place) -> Tensor:
        """W − Q, with W read the way round in which it is the nearer to Q."""
        key, stored, rows = self._original(place)
        quantised = dense(place)
        candidates = [
            matrix.to(device=place.device, dtype=place.dtype)
            for matrix in _readings(stored.detach(), place, rows)
        ]
        if not candidates:
            raise UserError(
                f"'{place.name}': LoftQ was given '{key}' of shape {tuple(stored.shape)}, which is "
                f"not the shape of {tuple(quantised.shape)} of the quantised weight in any way "
                "round. Give the weights of the very model that was quantised."
            )
        if not bool(torch.isfinite(stored).all()):
            raise UserError(f"'{place.name}': LoftQ was given '{key}' with non-finite numbers.")
        whole = min(candidates, key=lambda matrix: float((matrix - quantised).norm()))
        lost = whole - quantised
        if float(lost.norm()) >= float(whole.norm()) > 0:
            raise UserError(
                f"'{place.name}': the quantised weight is as far from '{key}' as zero would be, so "
                "it was not made from it. Give LoftQ the weights of the very model that was "
                "quantised."
            )
        return lost

    def _original(self, place: Place) -> tuple[str, Tensor, tuple[int, ...] | slice | None]:
        """The name and value of the original weight, and the rows of it that the place is."""
        held = self.weights
        if isinstance(held, nn.Module):
            held = dict(held.named_parameters(remove_duplicate=False))
        owner = place.name if place.rows is None else place.name.rpartition(".")[0]
        for key, rows in (
            (place.name, None),
            (f"{place.name}.weight", None),
            (f"{place.name}_weight", None),  # of nn.MultiheadAttention with keys of another size
            (f"{owner}.weight", place.rows),
            (f"{owner}.in_proj_weight", place.rows),
        ):
            if key in held:
                return key, held[key], rows
        raise UserError(
            f"'{place.name}': LoftQ was given no '{owner}.weight'."
            f"{nearest(f'{owner}.weight', held)} It needs the weights before quantisation of "
            "everything that is adapted."
        )


def _readings(
    stored: Tensor, place: Place, rows: tuple[int, ...] | slice | None
) -> Iterator[Tensor]:
    """The stored tensor as the place's matrix, as it is and transposed, where the shape fits."""
    lead = () if place.bank is None else (place.bank,)
    wanted = (*lead, place.out_features, place.in_features)
    if stored.ndim < len(wanted):
        return
    flat = stored.flatten(len(wanted) - 1)
    for matrix in (flat, flat.mT):
        cut = matrix
        if rows is not None and matrix.shape[-1] == place.in_features:
            inside = isinstance(rows, slice) or max(rows) < matrix.shape[-2]
            index = rows if isinstance(rows, slice) else list(rows)
            cut = matrix[..., index, :] if inside else matrix
        if tuple(cut.shape) == wanted:
            yield cut
