"""Which modules the names in a PEFT configuration mean, and how to name modules exactly there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mode
from typing import TypeVar

import regex

from rankwise.errors import ArtifactError
from rankwise.methods.restate import exactly
from rankwise.targets import PATTERN_SECONDS

__all__ = ["Rule", "entries", "exact", "patterns", "saved_entries", "value_for", "within"]

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Rule:
    """The options of a PEFT LoraConfig that choose modules, with PEFT's own meaning (0.21).

    Attributes:
        target_modules: a text is a regular expression for the whole name; a tuple holds names or
            ends of names after a dot.
        exclude_modules: the same language; wins.
        modules_to_save: ends of names, after a dot or not; these train whole, and nothing inside
            them is a target.
        layers: block numbers to keep among the targets named by their end; None keeps all.
        layers_pattern: names of the lists that hold the blocks; empty means any.
    """

    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str = ()
    modules_to_save: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def targets(self, name: str) -> bool:
        """Whether the module of this name is adapted.

        Raises:
            ArtifactError: an expression is malformed or takes over two seconds.
        """
        if _named(self.exclude_modules, name):
            return False
        if any(_match(rf"(^|.*\.){m}($|\..*)", name) for m in self.modules_to_save):
            return False
        if not _named(self.target_modules, name):
            return False
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return True
        return not self.layers or self._block(name) in self.layers

    def saves(self, name: str) -> bool:
        """Whether the module of this name trains whole."""
        return name.endswith(self.modules_to_save)

    def _block(self, name: str) -> int | None:
        if not self.layers_pattern:
            found = _match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
            return int(found["idx"]) if found else None
        for pattern in self.layers_pattern:
            found = _match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
            if found:
                return int(found["idx"])
        return None


def value_for(keys: Mapping[str, Number], name: str, default: Number) -> Number:
    r"""What a rank_pattern or alpha_pattern says about a module: the first key that matches counts.

    PEFT's rule is ``re.match(rf"(.*\.)?({key})$", name)``.

    Raises:
        ArtifactError: a key is malformed or takes over two seconds.
    """
    return next((v for key, v in keys.items() if _match(rf"(.*\.)?({key})$", name)), default)


def entries(wanted: Collection[str], names: Iterable[str]) -> tuple[str, ...] | str:
    """A ``target_modules`` that means ``wanted`` among the module names of a model, no other.

    Each is named by the shortest end of its name that no other module has; where even the full
    name is the end of another module's name, one regular expression lists them all.
    """
    every = Counter(end for name in names for end in _ends(name))
    among = Counter(end for name in wanted for end in _ends(name))
    found = {next((e for e in _ends(n) if every[e] == among[e]), None) for n in wanted}
    if None in found:
        return "|".join(re.escape(name) for name in sorted(wanted))
    return tuple(sorted(end for end in found if end is not None))


def patterns(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The most frequent value, and a pattern that gives every other module its own.

    Each key is an end of names that all have one value, or the full name behind ``^`` where the
    name is itself the end of another. Keys are escaped only where they hold more than letters,
    digits, ``_``, ``-`` and dots, and only as long as an unescaped dot changes nothing: readers
    other than PEFT may compare them as plain text.
    """
    default = mode(values.values())
    held: dict[str, set[Number]] = {}
    for name, value in values.items():
        for end in _ends(name):
            held.setdefault(end, set()).add(value)
    plain: dict[str, Number] = {}
    for name, value in values.items():
        if value != default:
            end = next((e for e in _ends(name) if len(held[e]) == 1), "^" + name)
            plain[end] = value
    simple = all(re.fullmatch(r"\^?[\w.-]+", key) for key in plain)
    if simple and all(value_for(plain, name, default) == v for name, v in values.items()):
        return default, plain
    return default, {"^" + re.escape(n): v for n, v in values.items() if v != default}


def saved_entries(modules: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """A ``modules_to_save`` for these modules: of each the shortest end of its name that PEFT
    reads as this module alone.

    PEFT compares ends without regard to dots, so ``head`` also means ``lm_head``. Where no end
    means one module alone it is the full name, and the file must hold the others as well.
    """
    return tuple(sorted({_saved_entry(name, names) for name in modules}))


def _saved_entry(name: str, names: Sequence[str]) -> str:
    ends = list(_ends(name))
    return next((e for e in ends if [n for n in names if n.endswith(e)] == [name]), ends[-1])


def exact(wanted: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """For each wanted module a target of rankwise.LoRA that means it among ``names``, and no other.

    That is its name, unless another name ends in it.
    """
    inner = {end for name in names for end in _ends(name) if end != name}
    return {
        name: name if re.fullmatch(r"[\w.-]+", name) and name not in inner else exactly(name)
        for name in wanted
    }


def within(name: str, owners: Iterable[str]) -> bool:
    """Whether a dotted name is one of the owners, or lies inside one."""
    return any(name == owner or name.startswith(owner + ".") for owner in owners)


def _ends(name: str) -> Iterator[str]:
    """``a.b.c`` gives ``c``, ``b.c`` and ``a.b.c``."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))


def _named(choice: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(choice, str):
        return bool(choice) and _match(choice, name, whole=True) is not None
    return name in choice or any(name.endswith("." + end) for end in choice)


def _match(pattern: str, name: str, *, whole: bool = False) -> regex.Match[str] | None:
    """``re.match`` or ``re.fullmatch`` with a time limit, for expressions that come from a file."""
    try:
        if whole:
            return regex.fullmatch(pattern, name, timeout=PATTERN_SECONDS)
        return regex.match(pattern, name, timeout=PATTERN_SECONDS)
    except regex.error as error:
        raise ArtifactError(
            f"adapter_config.json: {pattern!r} is not a regular expression: {error}."
        ) from error
    except RecursionError as error:
        raise ArtifactError(
            f"adapter_config.json: the pattern {pattern[:60]!r}... is nested too deeply."
        ) from error
    except TimeoutError as error:
        raise ArtifactError(
            f"adapter_config.json: the pattern {pattern!r} took over {PATTERN_SECONDS:g} s on the "
            f"name '{name}'. Write a simpler one, or list the names."
        ) from error
