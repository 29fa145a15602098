"""Where each tensor of a PEFT file belongs in a model, and what is wrong with it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankwise.errors import nearest
from rankwise.io.peft_config import PeftConfig
from rankwise.io.peft_extras import bias_keys, bias_parameters, biases_meant, tokens_key
from rankwise.io.peft_forms import A_KEY, B_KEY, ROWS_KEYS, Form, Plain, Wanted
from rankwise.io.peft_keys import PREFIX, Named
from rankwise.io.peft_layout import Notes
from rankwise.io.peft_meaning import Meaning
from rankwise.io.peft_names import value_for, within
from rankwise.io.tensors import shown

__all__ = ["Places", "mismatch", "place", "rank_of"]

_KNOWN_ENDS = {
    "lora_magnitude_vector": "it belongs to DoRA, and use_dora is off",
    "lora_B.bias": "it is a bias on B, and lora_bias is off",
    "trainable_tokens_delta": "trainable_token_indices does not mean this module",
    "lora_diag": "it belongs to KaSA, which Rankwise has no layer for",
    "lora_velora_embed": "it belongs to VeLoRA, which Rankwise has no layer for",
    "base_layer.bias": "the model has no bias there",
}
_SAMPLER = "lora_monteclora_sampler"
_WRAPPED = (".base_layer", ".token_adapter", ".original_module")
_HINTS = 3  # names for which the nearest one is searched, which takes milliseconds each


@dataclass(frozen=True)
class Places:
    """The tensors of a file, each where it belongs.

    Attributes:
        forms: for each form its tensors, by key behind its path; only complete ones.
        magnitudes: DoRA's magnitudes by form.
        b_biases: the biases of B by form, by key.
        biases: the biases of the base as they are by now, by full name.
        tokens: rows of embeddings as they are by now.
        trained: tensors of modules that train whole, by full name.
        base: tensors that the frozen base has as well, by full name; PEFT adds some.
        problems: one sentence for each tensor without a place and each place without a tensor.
    """

    forms: Mapping[str, Mapping[str, Tensor]]
    magnitudes: Mapping[str, Tensor]
    b_biases: Mapping[str, Mapping[str, Tensor]]
    biases: Mapping[str, Tensor]
    tokens: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    problems: Sequence[str]


@dataclass
class _Sorting:
    """The tensors that have not found their place yet, and what is wrong so far."""

    left: dict[str, Tensor]
    problems: list[str] = field(default_factory=list[str])
    expected: list[str] = field(default_factory=list[str])

    def take(self, key: str) -> Tensor | None:
        self.expected.append(key)
        return self.left.pop(key, None)


def place(named: Named, config: PeftConfig, notes: Notes, meant: Meaning) -> Places:
    """Give each tensor of a file its place on the model, or say what is wrong with it."""
    sorting = _Sorting(dict(named.tensors))
    forms = {
        form.target: found
        for form in meant.forms
        if (found := _factors(sorting, form, rank_of(form, config, notes))) is not None
    }
    magnitudes = _magnitudes(sorting, meant) if config.dora else {}
    b_biases = _b_biases(sorting, meant) if config.lora_bias else {}
    tokens = _tokens(sorting, meant)
    biases = _biases(sorting, config, notes, meant)
    trained = _trained(sorting, meant)
    base = _of_the_base(sorting, meant)
    problems = [*named.problems, *meant.problems, *sorting.problems, *_lost(sorting, meant)]
    if problems and named.changes and sorting.left:
        problems.append(f"its names were read like this: {'; '.join(named.changes)}.")
    return Places(forms, magnitudes, b_biases, biases, tokens, trained, base, problems)


def rank_of(form: Form, config: PeftConfig, notes: Notes) -> int:
    """The rank of a form in the file."""
    if isinstance(form, Plain) and form.target in notes.shares:
        return notes.shares[form.target].rows[1]
    return value_for(config.rank_pattern, form.target, config.r)


def mismatch(have: Tensor, wanted: Tensor) -> str | None:
    """Why a tensor of a file cannot take the place of one of the model's, or None."""
    if have.shape != wanted.shape:
        return f"has shape {tuple(have.shape)}, and {tuple(wanted.shape)} in the model."
    if wanted.is_floating_point() and not have.is_floating_point():
        return f"is {have.dtype}, and floating-point numbers are needed."
    return None


def _factors(sorting: _Sorting, form: Form, r: int) -> dict[str, Tensor] | None:
    """The factors of one form if all are there and fit."""
    wanted = form.wanted(r)
    found = {k: t for k in wanted if (t := sorting.take(f"{form.path}.{k}")) is not None}
    lacking = [key.removesuffix(".weight") for key in wanted if key not in found]
    if lacking:
        sorting.problems.append(
            f"target_modules means '{form.target}', and the file has no "
            f"{' and no '.join(lacking)} for it."
        )
    wrong = [
        f"{key.removesuffix('.weight')} of '{form.target}' {problem}"
        for key, tensor in found.items()
        if (problem := _wrong(tensor, wanted[key], r)) is not None
    ]
    if not wrong and not lacking and (problem := form.misfit(found)) is not None:
        wrong.append(f"lora_A of '{form.target}' {problem}")
    sorting.problems.extend(wrong)
    return None if wrong or lacking else found


def _wrong(tensor: Tensor, wanted: Wanted, r: int) -> str | None:
    """What is wrong with one factor, or None."""
    have, shape = tuple(tensor.shape), wanted.shape
    if not tensor.is_floating_point():
        return f"is {tensor.dtype}, and floating-point numbers are needed."
    if have == shape:
        return None
    if len(shape) == 2 and have == shape[::-1]:
        return f"has shape {have}, expected {shape}: it is transposed."
    others = [i for i in range(len(shape)) if i != wanted.axis]
    if len(have) == len(shape) and all(have[i] == shape[i] for i in others):
        return (
            f"has rank {have[wanted.axis] / wanted.each:g}, and r is {r:,} in adapter_config.json."
        )
    return f"has shape {have}, expected {shape}: it was made for another base."


def _exactly(sorting: _Sorting, key: str, shape: tuple[int, ...], what: str) -> Tensor | None:
    """A tensor that must be there, with this shape."""
    tensor = sorting.take(key)
    if tensor is None:
        sorting.problems.append(f"the file has no {what}.")
    elif not tensor.is_floating_point():
        sorting.problems.append(f"{what} is {tensor.dtype}, not floating-point numbers.")
    elif tuple(tensor.shape) != shape:
        sorting.problems.append(f"{what} has shape {tuple(tensor.shape)}, expected {shape}.")
    else:
        return tensor
    return None


def _magnitudes(sorting: _Sorting, meant: Meaning) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for form in meant.forms:
        key, what = (
            f"{form.path}.lora_magnitude_vector",
            f"lora_magnitude_vector of '{form.target}'",
        )
        tensor = _exactly(sorting, key, form.magnitude(), what)
        if tensor is not None:
            found[form.target] = tensor
    return found


def _b_biases(sorting: _Sorting, meant: Meaning) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for form in meant.forms:
        for key, shape in bias_keys(form).items():
            tensor = _exactly(sorting, f"{form.path}.{key}", shape, f"{key} of '{form.target}'")
            if tensor is not None:
                found.setdefault(form.target, {})[key] = tensor
    return found


def _tokens(sorting: _Sorting, meant: Meaning) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, ids in meant.tokens.items():
        module = meant.modules[name]
        if isinstance(module, nn.Embedding):
            shape = (len(ids), module.embedding_dim)
            what = f"trainable_tokens_delta of '{name}'"
            tensor = _exactly(sorting, tokens_key(name, meant.paths), shape, what)
            if tensor is not None:
                found[name] = tensor
    return found


def _biases(
    sorting: _Sorting, config: PeftConfig, notes: Notes, meant: Meaning
) -> dict[str, Tensor]:
    """The biases of the base that have changed; those that must be there and are not are told."""
    if config.bias == "none" and not notes.biases:
        return {}
    there = bias_parameters(meant.modules, meant.whole)
    needed = notes.biases
    if needed is None:
        needed = tuple(biases_meant(config.bias, meant.forms, there))
    every = there if config.bias == "all" else needed
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys([*needed, *every]):
        tensor = sorting.take(meant.paths.tensor(name))
        frozen = there.get(name)
        if tensor is None and name in needed and not (config.lora_bias and frozen is None):
            sorting.problems.append(
                f"bias is '{config.bias}', and the file has no bias for '{name}': it was lost when "
                "the adapter was saved. Save it again with a newer PEFT."
            )
        elif tensor is not None and frozen is not None:
            problem = mismatch(tensor, frozen)
            sorting.problems.extend([f"{shown(name)} {problem}"] if problem else [])
            found.update({} if problem else {name: tensor})
        elif tensor is not None:
            found[name] = tensor
    return found


def _trained(sorting: _Sorting, meant: Meaning) -> dict[str, Tensor]:
    """Modules that train whole: each of their tensors must be there, in shape, and no other."""
    found: dict[str, Tensor] = {}
    for name in meant.whole:
        module = meant.modules.get(name)
        if module is None:
            hint = nearest(name, meant.modules)
            sorting.problems.append(f"the model has no module '{name}', which trained whole.{hint}")
            continue
        path = meant.paths.outer(name)
        copies = _copies(sorting.left, path)
        for key, wanted in module.state_dict().items():
            full, again = f"{name}.{key}", copies.get(key)
            tensor = sorting.take(f"{path}.{key}")
            if tensor is None:
                tensor = again
            if tensor is None:
                sorting.problems.append(f"{shown(full)} is missing; '{name}' trained whole.")
            elif again is not None and not torch.equal(again, tensor):
                sorting.problems.append(f"{shown(full)} is there twice, with other numbers.")
            elif (problem := mismatch(tensor, wanted)) is not None:
                sorting.problems.append(f"{shown(full)} {problem}")
            else:
                found[full] = tensor
    return found


def _copies(left: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """What a plain state_dict, or bias="all", has of a trained copy once more; taken out."""
    prefix = f"{path}.modules_to_save."
    found: dict[str, Tensor] = {}
    for key in [key for key in left if key.startswith(prefix)]:
        rest = key.removeprefix(prefix)
        tensor = left.pop(key)
        found[rest] = tensor
        found[rest.partition(".")[2]] = tensor  # behind the name of the adapter
    return found


def _of_the_base(sorting: _Sorting, meant: Meaning) -> dict[str, Tensor]:
    """What the file has of the frozen base, taken from what is left."""
    known = {
        f"{n}.{k}" for n, m in meant.modules.items() for k, _ in m.named_parameters(recurse=False)
    }
    found: dict[str, Tensor] = {}
    for key in list(sorting.left):
        plain = key
        for part in _WRAPPED:
            plain = plain.replace(f"{part}.", ".")
        if plain in known:
            found[plain] = sorting.left.pop(key)
    return found


def _lost(sorting: _Sorting, meant: Meaning) -> Iterator[str]:
    """A sentence for each tensor without a place."""
    for i, key in enumerate(sorting.left):
        if within(key, meant.whole):
            owner = next(name for name in meant.whole if within(key, (name,)))
            yield f"{shown(key)} has no place in '{owner}'."
            continue
        adapted = _adapted(key, meant)
        if adapted is not None:
            yield f"the file has factors for '{adapted}', which target_modules does not mean."
            continue
        reason = next((why for end, why in _KNOWN_ENDS.items() if key.endswith(f".{end}")), None)
        if f".{_SAMPLER}." in key:
            reason = "it belongs to MonteCLoRA, which Rankwise has no layer for"
        hint = ""
        if i < _HINTS and reason is None:
            hint = nearest(PREFIX + key[:200], [PREFIX + e for e in sorting.expected], 1)
        why = f": {reason}" if reason else ""
        yield f"{shown(PREFIX + key)} has no place in this model{why}.{hint}"


def _adapted(key: str, meant: Meaning) -> str | None:
    """The module that a factor names, if the model has it and it is not adapted."""
    for end in (A_KEY, B_KEY, *ROWS_KEYS):
        name = key.removesuffix(f".{end}").replace(".base_layer", "")
        if key.endswith(f".{end}") and name in meant.modules:
            return None if name in {form.target for form in meant.forms} else name
    return None
