"""Where each tensor of a PEFT file belongs in a model, and what is wrong with it there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from rankwise.errors import nearest
from rankwise.io.peft_names import within
from rankwise.io.tensors import shown
from rankwise.layers import refusal, shape_of
from rankwise.targets import Site

__all__ = ["PREFIX", "Places", "factor_key", "incomplete", "misfits", "place"]

PREFIX = "base_model.model."
_COMPILED = "_orig_mod."  # what torch.compile puts into names
_FACTOR = re.compile(
    r"(?P<name>.+)\."
    r"(?:lora_(?P<linear>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.(?P<adapter2>[^.]+))?)"
)
_KNOWN_ENDS = {
    "lora_magnitude_vector": "it belongs to DoRA, which is not supported yet",
    "lora_B.bias": "it is a bias on B (lora_bias), which is not supported yet",
    "trainable_tokens_delta": "trained single tokens are not supported yet",
    "lora_diag": "it belongs to KaSA, which is not supported yet",
    "base_layer.bias": "trained biases are not supported yet",
}
_HINTS = 3  # names for which the nearest one is searched, which takes milliseconds each


@dataclass(frozen=True)
class Places:
    """The tensors of a file, each where it belongs.

    Attributes:
        linear: "A" and "B" of each module that is adapted as a linear layer.
        embedding: "A" and "B" of each module that is adapted as an embedding.
        trained: tensors of modules that train whole, by full name.
        base: tensors that the frozen base has as well, by full name; PEFT adds some.
        problems: one sentence for each tensor without a place and each module that lacks one.
    """

    linear: Mapping[str, Mapping[str, Tensor]]
    embedding: Mapping[str, Mapping[str, Tensor]]
    trained: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    problems: Sequence[str]

    def sides(self, name: str) -> dict[str, Tensor]:
        """The factors of one module, by "A" and "B"."""
        return {**self.linear.get(name, {}), **self.embedding.get(name, {})}

    def adapted(self) -> list[str]:
        """Names of the modules that have factors."""
        return list(dict.fromkeys([*self.linear, *self.embedding]))


def factor_key(name: str, side: str, *, embedding: bool) -> str:
    """How PEFT calls A or B of a module in the file."""
    return f"{PREFIX}{name}." + (f"lora_embedding_{side}" if embedding else f"lora_{side}.weight")


def place(
    tensors: Mapping[str, Tensor],
    table: Mapping[str, Site],
    expected: Sequence[str],
    whole: Sequence[str],
) -> Places:
    """Sort the tensors of a file by the modules of a model.

    ``expected`` are the modules that must be adapted, ``whole`` those that train whole. Names may
    hold ``_orig_mod.`` of a compiled model and the name of the one adapter (``lora_A.default``),
    as a plain ``state_dict`` has them.
    """
    linear: dict[str, dict[str, Tensor]] = {}
    embedding: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    lost: list[str] = []
    problems: list[str] = []
    adapters: set[str] = set()
    known = {
        f"{n}.{k}" for n, s in table.items() for k, _ in s.module.named_parameters(recurse=False)
    }
    for key, tensor in tensors.items():
        path = key.replace(_COMPILED, "")
        found = _FACTOR.fullmatch(path.removeprefix(PREFIX))
        if not path.startswith(PREFIX):
            lost.append(key)
        elif found is not None and found["name"] in table:
            adapters.add(found["adapter"] or found["adapter2"] or "")
            kind = linear if found["linear"] else embedding
            sides = kind.setdefault(found["name"], {})
            side = found["linear"] or found["embedding"]
            if side in sides:
                problems.append(f"{shown(key)} occurs twice, in two spellings.")
            sides[side] = tensor
        elif within(path := path.removeprefix(PREFIX), whole):
            trained[path] = tensor
        elif (plain := path.replace(".base_layer.", ".")) in known:
            base[plain] = tensor
        else:
            lost.append(key)
    places = Places(linear, embedding, trained, base, problems)
    if len(adapters) > 1:
        named = ", ".join(shown(name) for name in sorted(adapters))
        problems.append(f"its names mix several adapters ({named}); save one of them alone.")
    if not expected:
        problems.append("target_modules means no module of this model.")
    problems.extend(_unfilled(places, expected))
    problems.extend(_unexpected(lost, table, expected, whole))
    return places


def misfits(places: Places, table: Mapping[str, Site], ranks: Mapping[str, int]) -> Iterator[str]:
    """Each adapted module whose factors have another kind, dtype, rank or shape than it needs."""
    for name in places.adapted():
        module = table[name].module
        reason = refusal(module)
        is_embedding = isinstance(module, nn.Embedding)
        if reason is not None:
            yield f"'{name}' cannot be adapted: {reason}."
        elif name in (places.linear if is_embedding else places.embedding):
            kind = "an Embedding" if is_embedding else "no Embedding"
            yield f"'{name}' is {kind} here, and the names of its tensors say otherwise."
        else:
            out_features, in_features = shape_of(module)
            wanted = {"A": (ranks[name], in_features), "B": (out_features, ranks[name])}
            for side, tensor in places.sides(name).items():
                problem = _wrong(tensor, wanted[side], 0 if side == "A" else 1)
                if problem is not None:
                    yield f"lora_{side} of '{name}' {problem}"


def incomplete(places: Places, table: Mapping[str, Site], whole: Sequence[str]) -> Iterator[str]:
    """Modules that train whole: each of their tensors must be there, in shape, and no other."""
    for name in whole:
        if name not in table:
            yield f"the model has no module '{name}', which trained whole.{nearest(name, table)}"
            continue
        wanted = {f"{name}.{k}": t for k, t in table[name].module.state_dict().items()}
        have = {k: t for k, t in places.trained.items() if within(k, (name,))}
        yield from (
            f"{shown(k)} is missing; '{name}' trained whole." for k in wanted if k not in have
        )
        yield from (f"{shown(k)} has no place in '{name}'." for k in have if k not in wanted)
        for key in (k for k in wanted if k in have):
            problem = mismatch(have[key], wanted[key])
            if problem is not None:
                yield f"{shown(key)} {problem}"


def mismatch(have: Tensor, wanted: Tensor) -> str | None:
    """Why a tensor of a file cannot take the place of one of the model's, or None."""
    if have.shape != wanted.shape:
        return f"has shape {tuple(have.shape)}, and {tuple(wanted.shape)} in the model."
    if wanted.is_floating_point() and not have.is_floating_point():
        return f"is {have.dtype}, and floating-point numbers are needed."
    return None


def _unfilled(places: Places, expected: Sequence[str]) -> Iterator[str]:
    for name in expected:
        lacking = [f"lora_{side}" for side in "AB" if side not in places.sides(name)]
        if lacking:
            yield (
                f"target_modules means '{name}', and the file has no {' and no '.join(lacking)} "
                "for it."
            )
    meant = set(expected)
    for name in places.adapted():
        if name not in meant:
            yield f"the file has factors for '{name}', which target_modules does not mean."


def _unexpected(
    lost: Sequence[str], table: Mapping[str, Site], expected: Sequence[str], whole: Sequence[str]
) -> Iterator[str]:
    """A sentence for each tensor without a place; wrong prefixes are told in one."""
    known = [
        factor_key(name, side, embedding=isinstance(table[name].module, nn.Embedding))
        for name in expected
        for side in "AB"
    ]
    for name in whole:
        state = table[name].module.state_dict() if name in table else {}
        known.extend(f"{PREFIX}{name}.{key}" for key in state)
    bare = [key for key in lost if not key.replace(_COMPILED, "").startswith(PREFIX)]
    if bare:
        yield (
            f"{len(bare)} tensor name(s) do not begin with '{PREFIX}', the first being "
            f"{shown(bare[0])}.{nearest(bare[0][:200], known, 1)}"
        )
    prefixed = [key for key in lost if key.replace(_COMPILED, "").startswith(PREFIX)]
    for i, key in enumerate(prefixed):
        reason = next((why for end, why in _KNOWN_ENDS.items() if key.endswith("." + end)), None)
        hint = nearest(key[:200], known, 1) if i < _HINTS and reason is None else ""
        yield f"{shown(key)} has no place in this model{f': {reason}' if reason else ''}.{hint}"


def _wrong(tensor: Tensor, wanted: tuple[int, int], rank_axis: Literal[0, 1]) -> str | None:
    """What is wrong with one factor, or None."""
    have = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return f"is {tensor.dtype}, and floating-point numbers are needed."
    if have == wanted:
        return None
    if have == wanted[::-1]:
        return f"has shape {have}, expected {wanted}: it is transposed."
    if len(have) > 2:
        return f"has {len(have)} dimensions; updates of convolutions are not supported yet."
    if len(have) == 2 and have[1 - rank_axis] == wanted[1 - rank_axis]:
        return f"has rank {have[rank_axis]}, and r is {wanted[rank_axis]:,} in adapter_config.json."
    return f"has shape {have}, expected {wanted}: it was made for another base."
