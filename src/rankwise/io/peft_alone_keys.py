"""The tensors of a PEFT file sorted by their names alone, with no model at hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rankwise.errors import UserError
from rankwise.io.blueprint import Blueprint
from rankwise.io.peft_extras import change
from rankwise.io.peft_keys import named
from rankwise.io.peft_names import within
from rankwise.io.sketch import agree
from rankwise.io.tensors import shown
from rankwise.io.weights import tensor_key

__all__ = ["ON_MODEL", "Keys", "ModelNeeded", "sort_keys"]

ON_MODEL = (
    "on its model, in Python: rankwise.load_adapter, then rankwise.adapter_of(model), which "
    "rankwise.trim cuts and whose factors hold every update"
)
_KEY = re.compile(
    r"(?P<name>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)|lora_B\.(?P<bias>bias))"
)
_TOKENS, _UNSUPPORTED = ".trainable_tokens_delta", ".lora_diag"


class ModelNeeded(UserError):
    """The files do not tell what an adapter is, or cannot hold it; on its model it can be read."""


@dataclass
class Keys:
    """The tensors of a PEFT file by what they are.

    Attributes:
        sides: "A" and "B" of each adapted module.
        embeddings: names of those that are embeddings.
        magnitudes: of DoRA, by module.
        b_biases: on B (lora_bias), by module.
        biases: what was added to biases of the base, by full name.
        modules: names of modules that trained whole.
        trained: their tensors, by full name.
        copies: tensors of the base that PEFT saves as well.
        unknown: tensors that may be such copies or may have trained.
        needs: one sentence for each tensor that only the base or the model makes sense of.
        problems: one sentence for each tensor that is not understood.
        notes: what was left out.
    """

    sides: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    embeddings: list[str] = field(default_factory=list[str])
    magnitudes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    b_biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    modules: list[str] = field(default_factory=list[str])
    trained: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    copies: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    unknown: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    needs: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])


def sort_keys(
    tensors: Mapping[str, Tensor],
    saved: Sequence[str],
    told: Sequence[str] | None,
    base: Blueprint | None = None,
) -> Keys:
    """Sort the tensors of a file by their names.

    ``saved`` are the ends of names in modules_to_save; ``told`` the modules that trained whole
    where Rankwise wrote the file, so that what ``saved`` also means is known to be the base's. PEFT
    saves the embeddings of the base beside an adapted one: a tensor that is one of these, or equals
    the ``base``'s own, is left out; a bias becomes what was added to the base's; any other that
    has no place is a problem, or a need where the base or the model would tell.
    """
    spelled = named(tensors)
    keys = Keys(problems=list(spelled.problems), notes=[f"names: {c}" for c in spelled.changes])
    for name, tensor in spelled.tensors.items():
        found = _KEY.fullmatch(name)
        if found is not None and ".base_layer" in found["name"] + ".":
            keys.needs.append(
                f"{shown(name)} is wrapped twice, as PEFT does with nn.MultiheadAttention and with "
                "experts, and only the model tells what it is."
            )
        elif found is not None:
            _understood(keys, found, tensor)
        else:
            _other(keys, name, tensor, saved, told)
    if not keys.sides and not keys.needs:
        keys.problems.append("it holds no low-rank factors.")
    _settle(keys, base)
    return keys


def _understood(keys: Keys, found: re.Match[str], tensor: Tensor) -> None:
    name = found["name"]
    if found["magnitude"]:
        keys.magnitudes[name] = tensor
    elif found["bias"]:
        keys.b_biases[name] = tensor
    else:
        keys.sides.setdefault(name, {})[found["linear"] or found["embedding"]] = tensor
        if found["embedding"] and name not in keys.embeddings:
            keys.embeddings.append(name)


def _other(
    keys: Keys, path: str, tensor: Tensor, saved: Sequence[str], told: Sequence[str] | None
) -> None:
    """A tensor that is no part of an update: of a module trained whole, or perhaps the base's."""
    parts = path.split(".")
    owners = [".".join(parts[:i]) for i in range(1, len(parts))]
    meant = next((o for o in owners if saved and o.endswith(tuple(saved))), None)
    owner = meant if told is None else next((o for o in owners if o in told), None)
    if owner is not None:
        keys.trained[path] = tensor
        if owner not in keys.modules:
            keys.modules.append(owner)
    elif path.endswith(".base_layer.weight") or (meant is not None and within(path, (meant,))):
        keys.copies[path] = tensor
    else:
        keys.unknown[path] = tensor


def _settle(keys: Keys, base: Blueprint | None) -> None:
    """Which of the unknown tensors are copies of the base's or its biases, and which a problem."""
    wrapped = list(keys.copies.values())
    for path, tensor in keys.unknown.items():
        plain = path.replace(".base_layer.", ".")
        there = None if base is None else tensor_key(plain, base.shapes)
        own = None
        if base is not None and there is not None and base.shapes[there] == tuple(tensor.shape):
            own = base.fetch(there)
        if own is not None and plain.endswith(".bias"):
            keys.biases[plain] = change(own, tensor)
        elif any(_alike(tensor, other) for other in wrapped) or (
            own is not None and _alike(tensor, own)
        ):
            keys.copies[path] = tensor
        else:
            _unclear(keys, path, base)
    if keys.copies:
        keys.notes.append(
            f"left out: {len(keys.copies)} tensors of the base ({shown(next(iter(keys.copies)))}) "
            "that PEFT saves beside adapted embeddings and look-alike names"
        )


def _unclear(keys: Keys, path: str, base: Blueprint | None) -> None:
    """Say what is known of a tensor without a place, and who could tell more."""
    told = f"{shown(path)} is no part of an update, and modules_to_save does not name it: "
    if path.endswith(_TOKENS):
        keys.needs.append(
            f"{shown(path)} are trained rows of an embedding, which are stored as values; only "
            "the model tells what was added."
        )
    elif path.endswith(_UNSUPPORTED):
        keys.problems.append(f"{told}it belongs to KaSA, which is not supported.")
    elif base is not None or not path.endswith((".weight", ".bias")):
        keys.problems.append(f"{told}it trained as well, or it is of another base.")
    elif path.endswith(".bias"):
        keys.needs.append(
            f"{shown(path)} trained; biases are stored as values, and the base (--base) tells what "
            "was added."
        )
    else:
        keys.needs.append(
            f"{told}it trained as well, or it is a copy of the base, which --base would tell."
        )


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and agree(first, second)
