"""LoRA settings that differ in their rank alone, as lines of a figure, each with its rule for α."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankwise.lab import words
from rankwise.lab.records import RunRecord
from rankwise.lab.settings import Setting, differences

__all__ = ["Family", "families"]


@dataclass(frozen=True)
class Family:
    """LoRA settings from the smallest rank up; ``label`` says what they share."""

    label: str
    members: tuple[Setting, ...]


def families(settings: Sequence[Setting]) -> list[Family]:
    """The LoRA settings as lines over the rank.

    Settings that differ in more than r and α make lines of their own. Where both α = c·r and one α
    for all ranks were tried, each rule makes a line, and a setting of both is on both lines.
    """
    kinds: dict[str, list[Setting]] = {}
    for setting in settings:
        if setting.first.rank is not None:
            kinds.setdefault(_kind(setting.first), []).append(setting)
    told = differences([members[0].first for members in kinds.values()], but=("r", "alpha"))
    found: list[Family] = []
    for apart, members in zip(told, kinds.values(), strict=True):
        found += _by_rule(f"LoRA, {apart}" if apart else "LoRA", members)
    if len(found) == 1 and found[0].label == "LoRA":
        return [Family("LoRA over its ranks", found[0].members)]
    return found


def _kind(run: RunRecord) -> str:
    """What a LoRA run is besides its rank and α."""
    return words.plain({k: v for k, v in run.method.items() if k not in ("r", "alpha")})


def _by_rule(label: str, members: Sequence[Setting]) -> list[Family]:
    """One line for each rule for α that holds at two ranks or more; the rest by themselves."""
    ordered = tuple(sorted(members, key=lambda s: s.first.rank or 0))
    if len({_ratio(s) for s in ordered}) == 1:
        return [Family(label, ordered)]
    rules: tuple[tuple[Callable[[Setting], float], str], ...] = ((_ratio, "·r"), (_alpha, ""))
    found: list[Family] = []
    for rule, unit in rules:
        for value in dict.fromkeys(map(rule, ordered)):
            line = tuple(s for s in ordered if rule(s) == value)
            if len({s.first.rank for s in line}) > 1:
                found.append(Family(f"{label}, α = {value:g}{unit}", line))
    placed = [s for family in found for s in family.members]
    rest = [s for s in ordered if not any(s is p for p in placed)]
    return found + [Family(f"{label}, α = {_alpha(s):g}", (s,)) for s in rest]


def _ratio(setting: Setting) -> float:
    return _alpha(setting) / (setting.first.rank or 1)


def _alpha(setting: Setting) -> float:
    return setting.first.alpha or 0.0
