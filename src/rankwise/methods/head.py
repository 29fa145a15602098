"""Head-only training, and how any method's trained copies of modules are planned."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from rankwise.attaching import Placement, Plan
from rankwise.errors import UserError, gather, nearest
from rankwise.targets import Head, Site, find_head, matches, shared_weights, sites

__all__ = [
    "HeadChoice",
    "HeadOnly",
    "copies",
    "describe_copies",
    "extra_modules",
    "head_modules",
    "head_trains",
    "outermost",
    "tied_partners",
    "trained_whole",
    "untied_notes",
]

HeadChoice = Literal["train", "freeze"] | None
"""What becomes of the output layer: a copy of it trains and is saved, it stays as it is, or, with
None, a classification head of transformers trains, a language model's output stays, and for any
other model it is an error not to say."""


@dataclass(frozen=True)
class HeadOnly:
    """Train the output layer alone, on frozen features: what LoRA must beat to be worth it.

    Attributes:
        modules_to_save: further modules that train whole, by name, suffix or pattern.
    """

    modules_to_save: tuple[str, ...] = ()

    def plan(self, model: nn.Module) -> Plan:
        """Copies of the head that train, beside a frozen base.

        Raises:
            UserError: the model has no output layer, or a name matches nothing.
        """
        names = [*head_modules(model), *extra_modules(model, self.modules_to_save)]
        if not names:
            raise UserError(
                f"{type(model).__name__} has no output layer that Rankwise can find, so there is "
                "nothing to train. Name the module in modules_to_save."
            )
        placements = copies(model, names)
        notes = (describe_copies(placements), *untied_notes(model, placements))
        return Plan(self, placements=placements, notes=notes)


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that make up the head; empty when there is none."""
    return find_head(model).names


def trained_whole(
    model: nn.Module, choice: HeadChoice, modules_to_save: Sequence[str], method: str
) -> tuple[Placement, ...]:
    """Copies of the head, as asked for, and of further modules, by the same patterns as elsewhere.

    Raises:
        UserError: a pattern means nothing, or nothing was said about the head where that is needed.
    """
    head, extra = find_head(model), extra_modules(model, modules_to_save)
    trains = head_trains(model, head, choice, extra, method)
    return copies(model, [*(head.names if trains else ()), *extra])


def head_trains(
    model: nn.Module,
    head: Head,
    choice: HeadChoice,
    extra: Sequence[str],
    method: str,
    or_else: str = "",
) -> bool:
    """Whether a copy of the output layer trains, where no update is put on it.

    Raises:
        UserError: there is no output layer to train, or nothing was said and that is needed.
    """
    if choice == "train" and not head.names:
        raise UserError(
            f"head='train', but {type(model).__name__} has no output layer that Rankwise can "
            "find. Name the module in modules_to_save instead."
        )
    if choice is not None:
        return choice == "train"
    if not head.names or set(head.names) <= set(extra):
        return False
    if head.kind == "output":
        raise UserError(
            f"The output layer '{head.names[0]}' would stay as it is, and nothing was said about "
            f"it. Say {method}(..., head='train') to train it and save it with the adapter, or "
            f"head='freeze' to leave it (right when it is pre-trained for this very task){or_else}."
        )
    return head.kind == "classification"


def extra_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that the patterns mean, each once.

    Raises:
        UserError: a pattern means no module that has parameters.
    """
    if not patterns:
        return []
    table = sites(model)
    whole = [n for n, s in table.items() if any(True for _ in s.module.parameters())]
    chosen: list[str] = []
    problems: list[str] = []
    for pattern in patterns:
        found = [name for name in whole if matches(pattern, name)]
        if not found:
            ends = dict.fromkeys(name.rpartition(".")[2] for name in whole)
            problems.append(
                f"'{pattern}' matches no module with parameters.{nearest(pattern, [*ends, *whole])}"
            )
        chosen.extend(found)
    gather(UserError, "modules_to_save", problems)
    return list(dict.fromkeys(chosen))


def outermost(names: Sequence[str]) -> list[str]:
    """The names that lie inside none of the others, each once."""
    return [n for n in dict.fromkeys(names) if not any(n.startswith(o + ".") for o in names)]


def copies(model: nn.Module, names: Sequence[str]) -> tuple[Placement, ...]:
    """Placements that put a trained copy in the place of each named module, the original kept.

    A module inside another named one is copied with it.
    """
    table = sites(model) if names else {}
    return tuple(Placement(table[name], copy.deepcopy) for name in outermost(names))


def tied_partners(model: nn.Module, names: Iterable[str]) -> Iterable[tuple[str, list[str]]]:
    """Each named module that shares a weight with other modules, and the names of those.

    One module that hangs in two places is no partner of itself, and a shared bias is no weight.
    """
    groups = [g for g in shared_weights(model) if not any(n.endswith("bias") for n in g)]
    for name in names if groups else ():
        own = {id(module) for module in model.get_submodule(name).modules()}
        owners = [[n.rpartition(".")[0] for n in group] for group in groups]
        others = [
            other
            for group in owners
            if any(id(model.get_submodule(o)) in own for o in group)
            for other in group
            if id(model.get_submodule(other)) not in own
        ]
        if others:
            yield name, list(dict.fromkeys(others))


def untied_notes(model: nn.Module, placements: Sequence[Placement]) -> Iterable[str]:
    """One sentence for each trained copy whose original shares a weight with another module."""
    for name, others in tied_partners(model, [p.site.name for p in placements]):
        yield (
            f"'{name}' shares its weight with {', '.join(others)}: the copy that trains is "
            "separate from it, and so is the merged model's."
        )


def describe_copies(placements: Sequence[Placement]) -> str:
    """One sentence that tells which modules train whole and how many parameters they hold."""
    parts = [f"{p.site.name} ({_size(p.site):,} parameters)" for p in placements]
    return (
        f"Trained whole and saved with the adapter: {', '.join(parts)}. "
        "The rest of the base is frozen."
    )


def _size(site: Site) -> int:
    return sum(p.numel() for p in site.module.parameters())
