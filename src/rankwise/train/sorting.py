"""What of a checkpoint differs from its base, tensor by tensor, and how an adapter can hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.errors import ArtifactError, UserError, gather
from rankwise.io.blueprint import Blueprint
from rankwise.io.weights import tensor_key
from rankwise.layers import is_conv1d
from rankwise.spectrum import frobenius, rounding_norm, subtract
from rankwise.targets import find_head, shared_weights

__all__ = ["Pair", "Sorted", "changed", "sort_tensors"]

_AS_ROUNDING = 0.7
"""Of the norm that rounding has on average: rounding hardly ever has less, and a change that shows
in no entry of the shorter format hardly ever more."""


@dataclass(frozen=True)
class Pair:
    """One tensor in both checkpoints.

    Attributes:
        name: by the model of the tuned checkpoint.
        before, after: its names in the files of the base and of the tuned checkpoint.
        transposed: whether it is stored (in, out).
    """

    name: str
    before: str
    after: str
    transposed: bool = False


@dataclass(frozen=True)
class Sorted:
    """The tensors of a tuned checkpoint beside those of its base.

    Attributes:
        low_rank: weights of linear layers that differ.
        biases: biases of linear layers that differ.
        whole: for each module that has to be saved whole, why.
        kept: by module saved whole, its tensors by full name and by their names in the file.
        loose: tensors that differ and belong to no module that can be saved.
        renamed: tensors that differ and that the files name otherwise than the model.
        untouched: how many tensors are the same but for the number format.
        transposed: whether linear layers are stored (in, out).
    """

    low_rank: tuple[Pair, ...]
    biases: tuple[Pair, ...]
    whole: Mapping[str, str]
    kept: Mapping[str, Mapping[str, str]]
    loose: tuple[str, ...]
    renamed: tuple[str, ...]
    untouched: int
    transposed: bool


def sort_tensors(model: nn.Module, base: Blueprint, tuned: Blueprint) -> Sorted:
    """Compare two checkpoints, reading one tensor of each at a time.

    ``model`` is that of the tuned checkpoint, on the meta device. A task's model holds the base
    under a name of its own, so names are matched by their ends.

    Raises:
        UserError: the checkpoints are not of one architecture, or the vocabulary was resized.
        ArtifactError: a tensor is missing.
    """
    modules = dict(model.named_modules())
    head = find_head(model)
    low: list[Pair] = []
    biases: list[Pair] = []
    whole: dict[str, str] = {}
    problems: list[str] = []
    loose: list[str] = []
    keys = {n: key for n in model.state_dict() if (key := tensor_key(n, tuned.shapes)) is not None}
    others = _others(model, keys, tuned)
    renamed = tuple(key for key in others if not _unchanged(key, base, tuned))
    untouched = len(others) - len(renamed)
    for name, after in keys.items():
        owner, _, leaf = name.rpartition(".")
        before = tensor_key(name, base.shapes)
        if before is None or (base.shapes[before] != tuned.shapes[after] and head.holds(owner)):
            _save_whole(owner, "not in the base", whole, loose, name)
        elif base.shapes[before] != tuned.shapes[after]:
            problems.append(
                f"'{name}' is {base.shapes[before]} in the base and {tuned.shapes[after]} in the "
                "tuned checkpoint."
            )
        elif _same(base.fetch(before), tuned.fetch(after)):
            untouched += 1
        elif isinstance(modules[owner], nn.Linear) or is_conv1d(modules[owner]):
            found = Pair(name, before, after, is_conv1d(modules[owner]))
            (low if leaf == "weight" else biases).append(found)
        else:
            kind = type(modules[owner]).__name__ if owner else "model"
            _save_whole(owner, f"{kind}, no linear layer", whole, loose, name)
    gather(UserError, "A low-rank update cannot turn one into the other", problems)
    _refuse_strangers(low, untouched, base, tuned)
    whole = _with_partners(model, whole)
    inside = tuple(f"{name}." for name in whole)
    return Sorted(
        low_rank=tuple(pair for pair in low if not pair.name.startswith(inside)),
        biases=tuple(pair for pair in biases if not pair.name.startswith(inside)),
        whole=whole,
        kept={name: _tensors(model, name, tuned) for name in whole},
        loose=tuple(loose),
        renamed=renamed,
        untouched=untouched,
        transposed=any(pair.transposed for pair in (*low, *biases)),
    )


def changed(pair: Pair, base: Blueprint, tuned: Blueprint) -> tuple[Tensor, Tensor]:
    """W0 and Δ = W − W0 as (out, in), or of a bias as (out,), Δ in float32 at least.

    Raises:
        ArtifactError: Δ is not finite.
    """
    first = base.fetch(pair.before)
    delta = subtract(tuned.fetch(pair.after), first)
    if not math.isfinite(frobenius(delta)):
        raise ArtifactError(
            f"'{pair.after}' holds numbers that are not finite, in {base.where} or {tuned.where}."
        )
    return (first.mT, delta.mT) if pair.transposed and delta.ndim == 2 else (first, delta)


def _save_whole(owner: str, why: str, whole: dict[str, str], loose: list[str], name: str) -> None:
    if owner:
        whole.setdefault(owner, why)
    else:
        loose.append(name)


def _same(base: Tensor, tuned: Tensor) -> bool:
    """Whether nothing but the format differs, as where a base in float32 was tuned in bfloat16.

    The base may also be the rounding of the weights that were tuned. Then they are as far apart as
    rounding takes them; what is nearer was changed, by less than the base's last digit.
    """
    if torch.equal(base.to(tuned.dtype), tuned):
        return True
    if base.element_size() >= tuned.element_size() or not torch.equal(tuned.to(base.dtype), base):
        return False
    return frobenius(subtract(tuned, base)) > _AS_ROUNDING * rounding_norm(base)


def _unchanged(key: str, base: Blueprint, tuned: Blueprint) -> bool:
    """Whether a tensor of the tuned checkpoint is the same in the base."""
    before = tensor_key(key, base.shapes)
    if before is None or base.shapes[before] != tuned.shapes[key]:
        return False
    return _same(base.fetch(before), tuned.fetch(key))


def _tensors(model: nn.Module, name: str, tuned: Blueprint) -> dict[str, str]:
    """The tensors of a module by full name, each with its name in the file."""
    partners = {n: group for group in shared_weights(model) for n in group}
    found: dict[str, str] = {}
    for key in model.get_submodule(name).state_dict():
        full = f"{name}.{key}"
        places = (tensor_key(n, tuned.shapes) for n in (full, *partners.get(full, ())))
        place = next((p for p in places if p is not None), None)
        if place is None:
            raise ArtifactError(f"{tuned.where} has no tensor '{full}'.")
        found[full] = place
    return found


def _with_partners(model: nn.Module, whole: Mapping[str, str]) -> dict[str, str]:
    """Also what is tied to a module saved whole, for it would keep the base's weight."""
    found = dict(whole)
    for group in shared_weights(model):
        owners = [name.rpartition(".")[0] for name in group]
        tied = next((o for o in owners if o in whole), None)
        for owner in owners if tied is not None else ():
            found.setdefault(owner, f"tied to '{tied}'")
    return {n: why for n, why in found.items() if not any(n.startswith(f"{o}.") for o in found)}


def _others(model: nn.Module, keys: Mapping[str, str], tuned: Blueprint) -> list[str]:
    """What the files hold under names that the model does not have, in place of what they lack.

    So transformers saves a mixture of experts: it joins all experts of a block when it loads them.
    The numbers are then as many; where they are not, tensors are missing.
    """
    tied = {name for group in shared_weights(model) for name in group}
    state = model.state_dict()
    gone = {n: t.numel() for n, t in state.items() if n not in keys and n not in tied}
    missing = [n for n, _ in model.named_parameters() if n in gone]
    known = set(keys.values())
    others = {key: math.prod(shape) for key, shape in tuned.shapes.items() if key not in known}
    if missing and sum(gone[n] for n in missing) <= sum(others.values()) <= sum(gone.values()):
        return list(others)
    told = [f"there is no '{name}'." for name in missing]
    gather(ArtifactError, f"{tuned.where} does not hold the model of its config.json", told)
    return []


def _refuse_strangers(low: list[Pair], untouched: int, base: Blueprint, tuned: Blueprint) -> None:
    if not low and not untouched:
        raise UserError(
            f"{base.where} and {tuned.where} have no weight in common, so one was not made from "
            "the other."
        )
