"""The same update in a form that a reader understands: one scale, one rank, whole modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import mode

import torch

from rankwise.errors import UserError
from rankwise.io.portable import Portable
from rankwise.lowrank import Factors
from rankwise.methods.restate import plain

__all__ = ["fold", "join_parts", "one_alpha", "one_rank", "one_scale", "without_starts"]


def without_starts(portable: Portable) -> Portable:
    """Every start (A0, B0) turned into the exact plain pair, for an untouched base."""
    started = [name for name, f in portable.factors.items() if f.A0 is not None]
    if not started:
        return portable
    made = replace(portable, adapter=plain(portable.adapter))
    return made.noting(
        f"start: {len(started)} updates begin at A0, B0, which no file format holds; each becomes "
        f"the exact pair [A; A0], [B, −B0] of rank {made.factors[started[0]].r}"
    )


def join_parts(portable: Portable) -> Portable:
    """Updates of parts of a fused projection as one update of the whole, exactly.

    Formula: A = [A_1; A_2; ...] (Σr, in), and B (rows of the projection, Σr) holds each B_i in the
    rows of its part and the columns of its ranks, zero elsewhere.

    Raises:
        UserError: a part also has a DoRA magnitude.
    """
    parts = portable.parts()
    if not parts:
        return portable
    whole = {name: module for module, names in parts.items() for name in names}
    held = [name for name in whole if name in portable.adapter.magnitudes]
    if held:
        raise UserError(
            f"'{held[0]}' is a part of a fused projection with a DoRA magnitude, and this format "
            "has no parts. Merge the adapter into its base instead (rankwise.merge)."
        )
    factors: dict[str, Factors] = {}
    for name, own in portable.factors.items():
        module = whole.get(name)
        if module is None:
            factors[name] = own
        elif module not in factors:
            factors[module] = _joined(portable, module, parts[module])
    ranks = sorted({factors[module].r for module in parts})
    joined = portable.with_factors(factors)
    method = replace(joined.adapter.method, split={})
    return replace(joined, adapter=replace(joined.adapter, method=method)).noting(
        f"parts: {len(whole)} updates of parts become {len(parts)} updates of whole projections of "
        f"rank {_listed(ranks)}, zero outside their rows"
    )


def fold(portable: Portable, why: str) -> Portable:
    """Every scale s multiplied into B in float32, so that α = r and s = 1 everywhere."""
    scales = sorted({f.scale for f in portable.factors.values()})
    return portable.with_factors({n: _scaled(f, 1.0) for n, f in portable.factors.items()}).noting(
        f"fold: the scale {_listed(scales)} went into B in float32, and lora_alpha is r: {why}"
    )


def one_alpha(portable: Portable, why: str) -> tuple[Portable, float]:
    """One α for every rank, s = α/r; B takes up the rest where the true α = s·r differ.

    Where all agree nothing changes. Otherwise α is the most frequent rank.
    """
    alphas = [f.scale * f.r for f in portable.factors.values()]
    if all(math.isclose(a, alphas[0], rel_tol=1e-9) for a in alphas):
        return portable, float(f"{alphas[0]:.12g}")
    alpha = float(mode(f.r for f in portable.factors.values()))
    changed = {n: _scaled(f, alpha / f.r) for n, f in portable.factors.items()}
    return portable.with_factors(changed).noting(
        f"fold: α of {min(alphas):g} to {max(alphas):g} became {alpha:g} for every rank, the rest "
        f"went into B in float32: {why}"
    ), alpha


def one_scale(portable: Portable, why: str) -> tuple[Portable, float]:
    """One scale s for all; where they differ it is 1 and each went into its B."""
    scales = [f.scale for f in portable.factors.values()]
    if all(math.isclose(s, scales[0], rel_tol=1e-9) for s in scales):
        return portable, scales[0]
    return fold(portable, why), 1.0


def one_rank(portable: Portable, why: str) -> Portable:
    """Smaller ranks padded with zeros to the largest, each keeping its scale."""
    largest = max(f.r for f in portable.factors.values())
    smaller = [n for n, f in portable.factors.items() if f.r < largest]
    if not smaller:
        return portable
    padded = {n: _padded(f, largest) for n, f in portable.factors.items()}
    return portable.with_factors(padded).noting(
        f"pad: {len(smaller)} updates of smaller rank got zeros up to rank {largest}: {why}"
    )


def _joined(portable: Portable, module: str, names: Sequence[str]) -> Factors:
    own = [portable.factors[name] for name in names]
    same = all(math.isclose(f.scale, own[0].scale, rel_tol=1e-9) for f in own)
    own = own if same else [_scaled(f, 1.0) for f in own]
    split = portable.split(module)
    total = sum(split.sizes) if split.sizes else own[0].out_features * len(split.names)
    rows = split.rows(total)
    b = own[0].B.new_zeros(total, sum(f.r for f in own))
    column = 0
    for f, name in zip(own, names, strict=True):
        b[list(rows[name.rpartition(".")[2]]), column : column + f.r] = f.B
        column += f.r
    return Factors(torch.cat([f.A for f in own]), b, own[0].scale)


def _scaled(f: Factors, scale: float) -> Factors:
    """The same δ with another scale; what changes is B, in float32 at least and rounded once."""
    if f.scale == scale:
        return f
    wide = torch.promote_types(f.B.dtype, torch.float32)
    return Factors(f.A.to(wide), (f.B.double() * (f.scale / scale)).to(wide), scale)


def _padded(f: Factors, r: int) -> Factors:
    more = r - f.r
    return Factors(
        torch.nn.functional.pad(f.A, (0, 0, 0, more)),
        torch.nn.functional.pad(f.B, (0, more)),
        f.scale,
    )


def _listed(values: Iterable[float]) -> str:
    every = [f"{value:.6g}" for value in values]
    return ", ".join(every[:4]) + (f" and {len(every) - 4} more" if len(every) > 4 else "")
