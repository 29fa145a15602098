"""What a loralib checkpoint holds beside A and B: heads, biases, and weights of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rankwise.errors import ArtifactError, UserError, gather, nearest
from rankwise.io.blueprint import Blueprint
from rankwise.io.peft_names import within
from rankwise.io.sketch import agree
from rankwise.lowrank import Factors
from rankwise.targets import matches

__all__ = ["Rest", "sort_rest"]


@dataclass
class Rest:
    """The further tensors of a checkpoint, each where it belongs.

    Attributes:
        modules: names of modules that trained whole.
        trained: their tensors, by full name.
        biases: Δb by the bias's name: the bias of the file less the base's.
        notes: what was left out and why that is right, one sentence each.
    """

    modules: list[str] = field(default_factory=list[str])
    trained: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    notes: list[str] = field(default_factory=list[str])


def sort_rest(
    tensors: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
    modules: Sequence[str],
    drop_base: bool,
    base: Blueprint | None,
    where: str,
) -> Rest:
    """Give each further tensor its place, or say why it has none.

    ``modules`` are those that trained whole, by name or end of a name. A bias is stored as its
    value and kept as what was added to the base's, so the base is needed for it. A weight of the
    base is left out where it is the base's own, or where ``drop_base`` says so: a full state dict
    that loralib saved in eval mode has the update in the weight already, and A and B on top of that
    weight would count twice.

    Raises:
        UserError: a module that trained whole is not in the file.
        ArtifactError: lists what has no place.
    """
    rest = Rest()
    left: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        owner = _owner(key, modules)
        if owner is None:
            left[key] = tensor
        else:
            rest.trained[key] = tensor
            if owner not in rest.modules:
                rest.modules.append(owner)
    unused = [m for m in modules if not any(matches(m, name) for name in rest.modules)]
    owners = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    gather(
        UserError,
        f"{where} holds no such module",
        [f"'{m}' trained whole, by what was said.{nearest(m, owners)}" for m in unused],
    )
    if drop_base and base is None:
        rest.notes.extend(_dropped(left))
    elif base is None:
        gather(ArtifactError, f"{where} holds more than A and B", _unplaced(left, factors))
    else:
        _against(base, left, factors, rest, drop_base, where)
    return rest


def _owner(key: str, modules: Sequence[str]) -> str | None:
    """The outermost module of a tensor's name that one of ``modules`` means."""
    parts = key.split(".")
    names = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((n for n in names if any(matches(m, n) for m in modules)), None)


def _dropped(left: Mapping[str, Tensor]) -> list[str]:
    if not left:
        return []
    biases = sum(key.endswith(".bias") for key in left)
    asked = f"left out: {len(left)} tensors of the base ({biases} of them biases), as was asked"
    return [f"{asked}; A and B belong to the original base, not to these weights"]


def _unplaced(left: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> list[str]:
    """One sentence for each kind of tensor that has no place without a base."""
    biases = [key for key in left if key.endswith(".bias")]
    beside = [key for key in left if key not in biases and _adapted(key, factors)]
    other = [key for key in left if key not in biases and key not in beside]
    problems: list[str] = []
    if beside:
        problems.append(
            f"the weight of {len(beside)} adapted layers, as {_some(beside)}. loralib merges in "
            "eval(), so a state dict saved then has the update in the weight already, and A and B "
            "on top would count twice. Say drop_base (--drop-base) to take A and B alone, for the "
            "original base, or give that base to compare with."
        )
    if biases:
        problems.append(
            f"{len(biases)} biases, as {_some(biases)}. They are stored as values, and an adapter "
            "holds what was added to the base's: give the base (base=, --base)."
        )
    if other:
        problems.append(
            f"{len(other)} further tensors, as {_some(other)}. Name the modules that trained whole "
            "(modules, --modules-to-save), and say drop_base (--drop-base) for the rest."
        )
    return problems


def _against(
    base: Blueprint,
    left: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
    rest: Rest,
    drop_base: bool,
    where: str,
) -> None:
    """Compare each tensor with the base's: equal ones are left out, biases become Δb."""
    problems: list[str] = []
    same: list[str] = []
    twice: list[str] = []
    for key, tensor in left.items():
        plain = key.replace(".conv.", ".")
        if base.shapes.get(plain) != tuple(tensor.shape):
            if not drop_base:
                problems.append(f"{base.where} has no '{plain}' of shape {tuple(tensor.shape)}.")
            continue
        own = base.fetch(plain)
        if plain.endswith(".bias"):
            rest.biases[plain] = tensor - own.to(tensor.dtype)
        elif agree(own, tensor):
            same.append(plain)
        elif _is_merged(own, tensor, factors.get(plain.removesuffix(".weight"))):
            twice.append(plain)
        elif not drop_base:
            problems.append(
                f"'{plain}' is not the base's. If it trained whole, name it in modules "
                "(--modules-to-save); if not, this is another base, or drop_base (--drop-base) "
                "leaves it out."
            )
    gather(ArtifactError, f"{where} does not go with {base.where}", problems)
    if same or twice:  # a whole state dict, where most biases are just there
        rest.biases = {name: change for name, change in rest.biases.items() if change.any()}
    if same:
        rest.notes.append(f"left out: {len(same)} weights that are the base's own")
    if twice:
        rest.notes.append(
            f"left out: {len(twice)} weights with the update in them already, as '{twice[0]}' (the "
            "file was saved in eval mode); A and B are for the base without it"
        )


def _is_merged(own: Tensor, tensor: Tensor, factors: Factors | None) -> bool:
    """Whether a weight is the base's plus the update."""
    if factors is None:
        return False
    delta = factors.delta().to(own.dtype)
    if own.ndim > 2:
        delta = delta.reshape(own.shape)
    return any(d.shape == own.shape and agree(own + d, tensor) for d in (delta, delta.mT))


def _adapted(key: str, factors: Mapping[str, Factors]) -> bool:
    """Whether a key is a weight of an adapted module, or of a projection with adapted parts."""
    owner = key.removesuffix(".weight").removesuffix(".conv")
    return any(within(name, (owner,)) for name in factors)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:3])
