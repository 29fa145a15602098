"""extract: a LoRA adapter from the difference of two checkpoints, in bounded memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rankwise.errors import ArtifactError, UserError, gather
from rankwise.io.blueprint import Blueprint, blueprint
from rankwise.io.convert import refuse_place
from rankwise.io.peft_alone import write_peft_alone
from rankwise.io.portable import Portable, assemble
from rankwise.io.tensors import all_finite
from rankwise.lowrank import Factors
from rankwise.spectrum import chance_held, frobenius, nearest, rounding_norm
from rankwise.train.blank import blank_model
from rankwise.train.memory import give_back
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.snapshot import local_folder
from rankwise.train.sorting import Pair, Sorted, changed, sort_tensors

__all__ = ["Extraction", "LayerChange", "extract"]


@dataclass(frozen=True)
class LayerChange:
    """What became of one weight from the base to the tuned checkpoint.

    Attributes:
        outputs, inputs: its size.
        r: rank of its update.
        base_norm: ‖W0‖_F.
        norm: ‖Δ‖_F.
        lost: ‖Δ − δ‖_F, measured.
        chance: the share of ‖Δ‖² that rank r would hold of a change without structure.
        rounding: the most of ‖Δ‖_F that the rounding of 16-bit weights can be.
        exact: whether the decomposition was exact.
    """

    outputs: int
    inputs: int
    r: int
    base_norm: float
    norm: float
    lost: float
    chance: float
    rounding: float
    exact: bool

    @property
    def held(self) -> float:
        """The share of ‖Δ‖² that the update holds."""
        return 1 - (self.lost / self.norm) ** 2 if self.norm else 1.0


@dataclass(frozen=True)
class Extraction:
    """What was found.

    Attributes:
        layers: by name, every linear layer whose weight differs.
        parameters: in A and B.
        whole: modules saved whole, each with the reason and its parameters.
        biases: how many biases of linear layers differ.
        left_out: what differs and is not in the adapter.
        untouched: how many tensors are the same but for the number format.
    """

    layers: Mapping[str, LayerChange]
    parameters: int
    whole: Mapping[str, tuple[str, int]] = field(default_factory=dict[str, "tuple[str, int]"])
    biases: int = 0
    left_out: tuple[str, ...] = ()
    untouched: int = 0

    @property
    def held(self) -> float:
        """The share of Σ ‖Δ‖² that all updates hold together."""
        norm = math.hypot(*(layer.norm for layer in self.layers.values()))
        lost = math.hypot(*(layer.lost for layer in self.layers.values()))
        return 1 - (lost / norm) ** 2 if norm else 1.0


def extract(
    base: str,
    tuned: str,
    out: str | os.PathLike[str],
    *,
    r: int | None = None,
    energy: float | None = None,
    only_lora: bool = False,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Extraction:
    """Write the adapter that turns a base into what was fine-tuned from it, as near as it may.

    Every linear layer whose weight differs gets the nearest update of its rank
    (:func:`rankwise.spectrum.nearest`); one that is the same but for its number format gets none.
    Changed biases of linear layers go beside their updates; what no update can hold, such as a
    changed normalisation, an embedding or a head that the base does not have, is saved whole. The
    files are read one tensor at a time, so that no more than both copies of the largest weight and
    its change in float32 are held beside the adapter itself.

    Args:
        base, tuned: folders of transformers models with safetensors, or names on a hub.
        out: folder to write, in PEFT's format.
        r: the rank, or the most there may be beside ``energy``.
        energy: the share of each ‖Δ‖² to hold.
        only_lora: leave out what is no low-rank update; it is listed.
        seed: of the random projections for large layers.
        reporter: told what happens.

    Raises:
        UserError: the two are not of one architecture, no linear layer differs, or something
            differs that an adapter cannot name, such as experts, and ``only_lora`` is not set.
        ArtifactError: a file is damaged or not finite.
        EnvironmentFault: a model cannot be had, or the disk refuses.
    """
    watcher = reporter or Silent()
    folders = [local_folder(base), local_folder(tuned)]
    refuse_place(Path(out), *folders)
    before, after = map(blueprint, folders)
    found = sort_tensors(blank_model(tuned), before, after)
    modules = {} if only_lora else found.kept
    _refuse(found, base, tuned, only_lora)
    _refuse_nonfinite(modules, after)
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Factors] = {}
    layers: dict[str, LayerChange] = {}
    watcher.start("extracting", len(found.low_rank))
    for done, pair in enumerate(found.low_rank, 1):
        name = pair.name.removesuffix(".weight")
        factors[name], layers[name] = _update(pair, before, after, r, energy, generator)
        give_back()  # the holes that a weight leaves would add up
        watcher.advance(done, {"held": layers[name].held})
    watcher.finish()
    biases = {} if only_lora else _biases(found, factors, before, after)
    trained = {n: after.fetch(key) for own in modules.values() for n, key in own.items()}
    adapter = assemble(factors, trained=trained, modules=list(modules), biases=biases)
    portable = Portable(adapter, transposed=found.transposed, base=base)
    write_peft_alone(portable, out)
    return Extraction(
        layers=layers,
        parameters=sum(f.count() for f in factors.values()),
        whole={} if only_lora else _sizes(found, trained),
        biases=len(biases),
        left_out=_left_out(found, only_lora),
        untouched=found.untouched,
    )


def _refuse(found: Sorted, base: str, tuned: str, only_lora: bool) -> None:
    """What no adapter can be made of, before the long work."""
    if found.renamed and not only_lora:
        raise UserError(
            f"Tensors that differ ({len(found.renamed):,}) have other names in the files of "
            f"'{tuned}' than in its model, such as '{found.renamed[0]}'. So transformers saves "
            "experts, which it joins into one tensor when it loads them, and no update is "
            "extracted for these. --only-lora (only_lora=True) leaves them out."
        )
    if found.low_rank or (found.biases and not only_lora):
        return
    rest = [*found.whole, *(pair.name for pair in found.biases), *found.loose, *found.renamed]
    if not rest:
        raise UserError(f"'{base}' and '{tuned}' are the same, so there is nothing to extract.")
    more = f" and {len(rest) - 10:,} more" if len(rest) > 10 else ""
    raise UserError(
        f"No weight of a linear layer differs between '{base}' and '{tuned}', so there is no "
        f"low-rank update to extract. What differs: {', '.join(rest[:10])}{more}."
    )


def _refuse_nonfinite(modules: Mapping[str, Mapping[str, str]], after: Blueprint) -> None:
    keys = dict.fromkeys(key for own in modules.values() for key in own.values())
    broken = [f"'{key}'" for key in keys if not all_finite(after.fetch(key))]
    gather(ArtifactError, f"{after.where} holds numbers that are not finite", broken)


def _update(
    pair: Pair,
    before: Blueprint,
    after: Blueprint,
    r: int | None,
    energy: float | None,
    generator: torch.Generator,
) -> tuple[Factors, LayerChange]:
    rounding = rounding_norm(after.fetch(pair.after))
    weight, delta = changed(pair, before, after)
    base_norm = frobenius(weight)
    del weight  # a copy less while Δ is decomposed
    found = nearest(delta, r=r, energy=energy, generator=generator)
    out, inside = delta.shape
    k = found.factors.r
    told = LayerChange(
        outputs=out,
        inputs=inside,
        r=k,
        base_norm=base_norm,
        norm=found.norm,
        lost=found.lost,
        chance=chance_held(out, inside, k),
        rounding=rounding,
        exact=found.exact,
    )
    return found.factors, told


def _biases(
    found: Sorted, factors: dict[str, Factors], before: Blueprint, after: Blueprint
) -> dict[str, Tensor]:
    """The change of each bias; its layer gets an update of rank 1 that is zero where it has none,
    for PEFT has a bias beside an update only.
    """
    made: dict[str, Tensor] = {}
    for pair in found.biases:
        owner = pair.name.rpartition(".")[0]
        _, made[pair.name] = changed(pair, before, after)
        if owner not in factors:
            shape = before.shapes[pair.before.rpartition(".")[0] + ".weight"]
            out, inside = reversed(shape) if pair.transposed else shape
            factors[owner] = Factors(torch.zeros(1, inside), torch.zeros(out, 1), 1.0)
    return made


def _sizes(found: Sorted, trained: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    return {
        name: (why, sum(trained[n].numel() for n in found.kept[name]))
        for name, why in found.whole.items()
    }


def _left_out(found: Sorted, only_lora: bool) -> tuple[str, ...]:
    own = [f"{name} (belongs to no module that can be saved)" for name in found.loose]
    if only_lora:
        own += [f"{name} ({why})" for name, why in found.whole.items()]
        own += [f"{pair.name} (a bias)" for pair in found.biases]
    if found.renamed:
        own.append(
            f"{len(found.renamed):,} tensors such as {found.renamed[0]} (the files name them "
            "otherwise than the model)"
        )
    return tuple(own)
