"""loralib's checkpoints: A and B by module, and what must be said because the file does not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rankwise.errors import ArtifactError, UserError, gather, nearest
from rankwise.io.blueprint import Blueprint
from rankwise.io.holding import FORMATS, demand
from rankwise.io.loralib_layers import convolution, merged, merged_back
from rankwise.io.loralib_rest import sort_rest
from rankwise.io.pickles import ask_for_pickle, read_pickle, write_pickle
from rankwise.io.portable import Kernel, Portable, assemble, pairs
from rankwise.io.reforms import join_parts, one_alpha, without_starts
from rankwise.io.tensors import read_tensors
from rankwise.layers import Split
from rankwise.lowrank import Factors, scaling
from rankwise.targets import first_match, matches

__all__ = ["Unsaid", "read_loralib", "write_loralib"]

_PARALLEL = "module."  # what DistributedDataParallel puts in front of every name


@dataclass(frozen=True)
class Unsaid:
    """What a loralib file does not say, and its reader therefore has to be told.

    Attributes:
        alpha: lora_alpha of the layers that were trained; s = α/r.
        enable_lora: which parts of a MergedLinear were on, by its name or end of name, such as
            ``{"c_attn": (True, False, True)}``.
        parts: names of the parts of a MergedLinear in their order.
        embeddings: names of adapted embeddings; their tensors are called as a linear layer's.
        modules: names of modules that trained whole, such as "classifier".
        drop_base: weights of the base in the file are left out unseen.
    """

    alpha: float | None = None
    enable_lora: Mapping[str, Sequence[bool]] = field(default_factory=dict[str, "Sequence[bool]"])
    parts: Sequence[str] = ("q_proj", "k_proj", "v_proj")
    embeddings: Sequence[str] = ()
    modules: Sequence[str] = ()
    drop_base: bool = False


def read_loralib(
    path: str | os.PathLike[str],
    unsaid: Unsaid,
    *,
    base: Blueprint | None = None,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
) -> Portable:
    """Read what ``torch.save(loralib.lora_state_dict(model), path)`` wrote.

    Keys are ``<module>.lora_A`` and ``<module>.lora_B`` for every kind of layer. r comes from the
    shapes; α, the parts of a MergedLinear and the kind of a layer are not in the file. With a
    ``base`` the shapes of its weights tell convolutions and check every layer; without it a
    convolution, and a MergedLinear with one part on, look like linear layers, and a note says so.

    Raises:
        UserError: α or enable_lora is missing, or a name that was given is not in the file.
        ArtifactError: lists all that is wrong with the file, or its fit to the base.
        EnvironmentFault: the file cannot be read.
    """
    where = f"'{path}'"
    if unsaid.alpha is None:
        raise UserError(
            f"{where} does not hold alpha, as no file of loralib does, and the update is scaled by "
            "alpha / r: a guess would serve another strength than was trained (loralib's default "
            "is 1, its own examples use 16 to 128). Give the lora_alpha of the training script."
        )
    if Path(path).suffix == ".safetensors":
        tensors = dict(read_tensors(path, allow_nonfinite=allow_nonfinite).tensors)
    else:
        ask_for_pickle(path, allow_pickle)
        tensors = read_pickle(path, allow_nonfinite=allow_nonfinite)
    if all(key.startswith(_PARALLEL) for key in tensors):
        tensors = {key.removeprefix(_PARALLEL): tensor for key, tensor in tensors.items()}
    sides, rest = _sorted(tensors)
    _refuse_unused(unsaid, sides, where)
    layers = _Layers(unsaid, unsaid.alpha, _shapes(rest, base))
    problems: list[str] = []
    for name, (a, b) in _halves(sides, where).items():
        problems.extend(layers.add(name, a, b))
    gather(ArtifactError, f"{where} cannot be used", problems)
    further = sort_rest(rest, layers.factors, unsaid.modules, unsaid.drop_base, base, where)
    adapter = assemble(
        layers.factors,
        trained=further.trained,
        modules=further.modules,
        biases=further.biases,
        splits=layers.splits,
    )
    notes = [f"alpha: {unsaid.alpha:g}, as was said; the file holds none", *further.notes]
    if layers.unseen:
        notes.append(
            f"kind: {layers.unseen} updates were read as those of linear layers; the file does not "
            "tell a convolution or a MergedLinear with one part on from them, a base would (--base)"
        )
    return Portable(
        adapter,
        embeddings=frozenset(layers.embeddings),
        kernels=layers.kernels,
        notes=tuple(notes),
    )


def write_loralib(portable: Portable, path: str | os.PathLike[str]) -> Portable:
    """Write A and B as ``loralib.lora_state_dict`` has them, for layers of one lora_alpha.

    Modules trained whole lie beside them under their own names. Gives back what was written; its
    notes say the lora_alpha and r that the layers must be built with.

    Raises:
        UserError: lists what these files cannot hold.
        EnvironmentFault: the disk refuses.
    """
    demand(portable, FORMATS["loralib"])
    portable, alpha = one_alpha(
        without_starts(portable), "the layers of loralib are built with one lora_alpha"
    )
    tensors: dict[str, Tensor] = {}
    parts = portable.parts()
    held = {
        module: merged_back({n: portable.factors[n] for n in names}, portable.split(module))
        for module, names in parts.items()
    }
    if None in held.values():
        portable, alpha = one_alpha(join_parts(portable), "their parts are of unequal size")
        held, parts = {}, {}
    for module, pair in held.items():
        if pair is not None:
            tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"], enabled = pair
            portable = portable.noting(f"MergedLinear: '{module}' has enable_lora={list(enabled)}")
    inside = {name for names in parts.values() for name in names}
    for name, f in portable.factors.items():
        if name not in inside:
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = f.A, f.B
    write_pickle(path, {**tensors, **portable.adapter.trained})
    ranks = sorted({f.r for f in portable.factors.values()})
    return portable.noting(
        f"loralib: build its layers with lora_alpha={alpha:g} and r={' or '.join(map(str, ranks))}"
    )


@dataclass
class _Layers:
    """Layers in the making, one :meth:`add` for each name of the file."""

    unsaid: Unsaid
    alpha: float
    shapes: Mapping[str, tuple[int, ...]]
    factors: dict[str, Factors] = field(default_factory=dict[str, Factors])
    embeddings: list[str] = field(default_factory=list[str])
    kernels: dict[str, Kernel] = field(default_factory=dict[str, Kernel])
    splits: dict[str, Split] = field(default_factory=dict[str, Split])
    unseen: int = 0

    def add(self, name: str, a: Tensor, b: Tensor) -> Iterator[str]:
        """Understand one pair of tensors; gives what is wrong with it."""
        shape = self.shapes.get(name)
        key = first_match(self.unsaid.enable_lora, name)
        rows, columns = b.shape[0], a.shape[1]
        if key is not None:
            enabled = tuple(self.unsaid.enable_lora[key])
            factors, split = merged(name, a, b, self.alpha, enabled, tuple(self.unsaid.parts))
            rows = sum(split.sizes or ())
            self.factors.update(factors)
            self.splits[name] = split
        elif shape is not None and len(shape) > 2:
            self.factors[name], self.kernels[name] = convolution(name, a, b, self.alpha, shape)
            return
        elif a.shape[0] != b.shape[1]:
            yield (
                f"'{name}' has A {tuple(a.shape)} and B {tuple(b.shape)}. A MergedLinear looks "
                "like this, and which of its parts were on is not in the file: give enable_lora, "
                f"such as {{'{name.rpartition('.')[2]}': (True, False, True)}} or --enable-lora "
                f"{name.rpartition('.')[2]}=101."
            )
            return
        else:
            self.factors[name] = Factors(a, b, scaling(a.shape[0], self.alpha))
            if any(matches(e, name) for e in self.unsaid.embeddings):
                self.embeddings.append(name)
            elif shape is None:
                self.unseen += 1
        if shape is not None and shape not in ((rows, columns), (columns, rows)):
            yield (
                f"'{name}' is an update of {rows} x {columns}, and its weight is {shape}. Another "
                "base, or a MergedLinear, whose enable_lora must be given."
            )


def _sorted(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The factors by module and side, and everything else by key."""
    sides: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, end = key.rpartition(".")
        if end in ("lora_A", "lora_B") and name:
            sides.setdefault(name, {})[end[-1]] = tensor
        else:
            rest[key] = tensor
    return sides, rest


def _halves(
    sides: Mapping[str, Mapping[str, Tensor]], where: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Both tensors of each name, floating and of two dimensions; their ranks may still differ."""
    plain = {n: both for n, both in sides.items() if not _grouped(both)}
    found = pairs(plain, where) if plain or not sides else {}
    grouped = {n: (both["A"], both["B"]) for n, both in sides.items() if n not in plain}
    return {name: found.get(name) or grouped[name] for name in sides}


def _grouped(both: Mapping[str, Tensor]) -> bool:
    if set(both) != {"A", "B"}:
        return False
    a, b = both["A"], both["B"]
    flat = a.ndim == b.ndim == 2 and a.is_floating_point() and b.is_floating_point()
    return flat and b.shape[1] > 0 and a.shape[0] > b.shape[1] and a.shape[0] % b.shape[1] == 0


def _shapes(rest: Mapping[str, Tensor], base: Blueprint | None) -> dict[str, tuple[int, ...]]:
    """Shapes of weights by module, from the base or from a full state dict."""
    known = dict(base.shapes) if base is not None else {}
    known.update({key: tuple(t.shape) for key, t in rest.items()})
    weights = {k: shape for k, shape in known.items() if k.endswith(".weight")}
    return {k.removesuffix(".weight").removesuffix(".conv"): s for k, s in weights.items()}


def _refuse_unused(unsaid: Unsaid, names: Mapping[str, object], where: str) -> None:
    said = {"enable_lora": unsaid.enable_lora, "embeddings": unsaid.embeddings}
    problems = [
        f"{option}: '{word}' is none of its adapted modules.{nearest(word, names)}"
        for option, words in said.items()
        for word in words
        if not any(matches(word, name) for name in names)
    ]
    gather(UserError, f"What was said of {where} does not go with it", problems)
