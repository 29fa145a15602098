"""inspect_adapter: the singular values of an adapter in any format, beside its base and another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from rankwise.errors import UserError, gather
from rankwise.io.blueprint import Blueprint, blueprint
from rankwise.io.convert import Wishes, read_any, read_on_model
from rankwise.io.peft_alone_keys import ModelNeeded
from rankwise.io.portable import Portable
from rankwise.io.weights import base_weight
from rankwise.lab import words
from rankwise.lab.inspecting.records import Inspection, LayerEvidence, Overlap
from rankwise.methods.adapter import Adapter
from rankwise.spectrum import (
    Directions,
    amplification,
    chance,
    directions,
    similarity,
    spectrum,
)
from rankwise.targets import targets_of
from rankwise.train.bare import bare_base
from rankwise.train.snapshot import base_of_run, local_folder

__all__ = ["evidence", "inspect_adapter"]


def inspect_adapter(
    path: str | os.PathLike[str],
    *,
    other: str | os.PathLike[str] | None = None,
    wishes: Wishes | None = None,
) -> Inspection:
    """Read an adapter in any format that Rankwise reads, or a run's, and measure every update.

    With the base (``wishes.base``; a run's own when it lies on this machine, in a folder or in the
    cache of the hub) also ‖W0‖ and the amplification; W0 is read one weight at a time. Where only
    the model tells what the adapter is (experts, nn.MultiheadAttention, rows of embeddings), the
    base is loaded as a whole. With ``other``, an adapter of the same base, also how alike their
    directions are.

    Raises:
        UserError: there is no adapter, or the base or the other adapter is of another model, or
            only the model tells what the adapter is and no base is known.
        ArtifactError: a file is damaged, or holds numbers that are not finite.
        EnvironmentFault: a package is missing, or a file cannot be read.
    """
    wishes = wishes or Wishes()
    named, place, given = _base(path, wishes)
    base = None if place is None else blueprint(place)
    try:
        portable = read_any(path, wishes, base)
        beside = None if other is None else read_any(other, wishes, base)
    except ModelNeeded as needed:
        base = bare_base(path, place, needed)
        portable = read_on_model(path, base, wishes)
        beside = None if other is None else read_on_model(other, base, wishes)
    if beside is not None:
        _refuse_strangers(portable, beside, str(other))
    layers = tuple(evidence(portable, base, beside, strict=given))
    notes = (*portable.notes, *uncovered(portable.adapter), *_unseen(named, base, layers))
    return Inspection(
        adapter=str(path),
        layers=layers,
        base=None if base is None else named,
        other=None if other is None else str(other),
        notes=notes,
    )


def evidence(
    portable: Portable,
    base: Blueprint | nn.Module | None = None,
    other: Portable | None = None,
    *,
    strict: bool = True,
) -> Iterator[LayerEvidence]:
    """What the update of each layer is, in the adapter's order; see :func:`inspect_adapter`.

    Raises:
        UserError: the base has no weight of a layer, unless not ``strict``.
    """
    weight_of = _weights(portable, base, strict)
    for name, factors in portable.factors.items():
        found = LayerEvidence(
            name=name,
            outputs=factors.out_features,
            inputs=factors.in_features,
            r=factors.r,
            scale=factors.scale,
            parameters=factors.count(),
            spectrum=spectrum(factors),
        )
        where = directions(factors)
        weight = weight_of(name)
        if weight is not None:
            norm = float(weight.double().norm())
            found = replace(found, base_norm=norm, amplification=amplification(where, weight))
        if other is not None and name in other.factors:
            found = replace(found, overlap=_overlap(where, directions(other.factors[name])))
        yield found


def uncovered(adapter: Adapter) -> Iterator[str]:
    """What of an adapter its singular values do not show, one sentence each."""
    banks = [name for name, f in adapter.factors.items() if f.bank is not None]
    if banks:
        yield (
            f"banks: {words.count(len(banks), 'update')} ('{banks[0]}') of a bank of weights each, "
            "which have one rank; the i-th singular value is the root of the sum of squares of "
            "theirs."
        )
    if adapter.magnitudes:
        yield (
            f"DoRA: {len(adapter.magnitudes)} updates have a magnitude m. The numbers are of δ, "
            "before the rows of W0 + δ are scaled to m."
        )
    if adapter.biases:
        yield f"not covered: {len(adapter.biases)} trained biases, which have no rank."
    if adapter.tokens:
        rows = sum(len(t.ids) for t in adapter.tokens.values())
        yield f"not covered: {rows} trained rows of embeddings."
    if adapter.modules:
        yield f"not covered: modules that trained whole ({', '.join(adapter.modules)})."


def _base(path: str | os.PathLike[str], wishes: Wishes) -> tuple[str | None, Path | None, bool]:
    """What the base is called, where it lies, and whether it was given or is the run's own."""
    if wishes.base is not None:
        return str(wishes.base), local_folder(str(wishes.base)), True
    own = base_of_run(path)
    return (None, None, False) if own is None else (*own, False)


def _weights(
    portable: Portable, base: Blueprint | nn.Module | None, strict: bool
) -> Callable[[str], Tensor | None]:
    """How W0 of a layer is had, as (out, in) or (E, out, in); None where it is not there."""
    whole = isinstance(base, nn.Module)
    targets = targets_of(base, portable.adapter.method.split) if whole else {}

    def read(name: str) -> Tensor | None:
        if not isinstance(base, Blueprint):
            return targets[name].weight() if name in targets else None
        try:
            return base_weight(portable, name, base)
        except UserError:
            if strict:
                raise
            return None

    return read


def _unseen(
    named: str | None, base: Blueprint | nn.Module | None, layers: Sequence[LayerEvidence]
) -> Iterator[str]:
    """Why ‖W0‖ is not told, of the whole adapter or of some layers."""
    if named is not None and base is None:
        yield (
            f"no ‖W0‖ and no amplification: the base of the run, '{named}', is not on this "
            "machine; name it by --base."
        )
    lacking = [layer.name for layer in layers if layer.base_norm is None]
    if isinstance(base, Blueprint) and lacking:
        yield (
            f"no ‖W0‖ and no amplification of {words.count(len(lacking), 'layer')} "
            f"('{lacking[0]}'): {base.where} has no weight of that name."
        )


def _refuse_strangers(portable: Portable, other: Portable, name: str) -> None:
    both = [n for n in portable.factors if n in other.factors]
    if not both:
        raise UserError(
            f"The adapter and '{name}' have no adapted layer in common, so there is nothing to "
            "compare. Name two adapters of one base."
        )
    pairs = ((n, portable.factors[n], other.factors[n]) for n in both)
    problems = [
        f"'{n}' is {a.out_features} by {a.in_features} here and {b.out_features} by "
        f"{b.in_features} there."
        for n, a, b in pairs
        if (a.out_features, a.in_features) != (b.out_features, b.in_features)
    ]
    gather(UserError, f"'{name}' is an adapter of another base", problems)


def _overlap(first: Directions, second: Directions) -> Overlap | None:
    i, j = first.values.shape[-1], second.values.shape[-1]
    if not i or not j:
        return None
    reads = _alike(first.right, second.right)
    writes = _alike(first.left, second.left)
    return Overlap(
        first=i,
        second=j,
        reads=float(reads[-1, -1]),
        reads_top=float(reads[0, 0]),
        writes=float(writes[-1, -1]),
        writes_top=float(writes[0, 0]),
        chance=chance(i, j, first.right.shape[-2]),
        grid=tuple(tuple(row) for row in reads.tolist()),
    )


def _alike(first: Tensor, second: Tensor) -> Tensor:
    """φ(i, j) (I, J); of a bank the mean over its weights."""
    found = similarity(first, second)
    return found if found.ndim == 2 else found.mean(dim=0)
