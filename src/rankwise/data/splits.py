"""Held-out rows, and what train and evaluation rows must and must not share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankwise.data.examples import Examples
from rankwise.data.shuffle import permutation
from rankwise.errors import UserError, gather

__all__ = ["Leakage", "leakage", "require_same_form", "split"]


@dataclass(frozen=True)
class Leakage:
    """Evaluation rows that are also train rows, labels aside.

    Attributes:
        count: how many evaluation rows are.
        rows: how many evaluation rows there are.
        first: where the first of them stands, such as ``dev.tsv:3 is train.tsv:17``, or "".
    """

    count: int
    rows: int
    first: str

    @property
    def note(self) -> str:
        """A warning for the user, or an empty string when nothing is shared."""
        if not self.count:
            return ""
        return (
            f"Leakage: {self.count} of {self.rows} evaluation rows ({self.count / self.rows:.1%}) "
            f"are also in the train data (first: {self.first}). The evaluation is too optimistic "
            "by what the model remembers of them."
        )


def leakage(train: Examples, evaluation: Examples) -> Leakage:
    """Count evaluation rows whose content is also a train row's, letter case and spaces aside."""
    seen: dict[str, int] = {}
    for i in range(len(train)):
        seen.setdefault(_key(train, i), i)
    shared = [i for i in range(len(evaluation)) if _key(evaluation, i) in seen]
    first = ""
    if shared:
        twin = seen[_key(evaluation, shared[0])]
        first = f"{evaluation.name(shared[0])} is {train.name(twin)}"
    return Leakage(len(shared), len(evaluation), first)


def split(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """(train, held out): ``fraction`` of the rows held out, the same for the same seed.

    Rows with the same content, letter case and spaces aside, stay on one side, so the split leaks
    nothing. For classification every class is split by itself, and a class of two or more
    different texts is on both sides. Both parts keep the order of the source.

    Raises:
        UserError: ``fraction`` is not between 0 and 1, or one part would be empty.
    """
    if not 0 < fraction < 1:
        raise UserError(f"The held-out fraction must be between 0 and 1, got {fraction}.")
    held: set[int] = set()
    for stratum, groups in _strata(examples).items():
        rows = sum(len(group) for group in groups)
        goal = min(max(round(fraction * rows), 1), rows - 1)
        order = permutation(len(groups), seed, "split", stratum)
        taken = 0
        for g in order[:-1]:  # one group always stays for training
            if taken >= goal:
                break
            held.update(groups[g])
            taken += len(groups[g])
    if not held:
        raise UserError(
            f"{examples.source} has too few different rows ({len(examples)} rows) to hold some out."
        )
    kept = [i for i in range(len(examples)) if i not in held]
    return examples.subset(kept), examples.subset(sorted(held))


def _strata(examples: Examples) -> dict[int, list[list[int]]]:
    """Per class (of its first row), the groups of rows that have one content."""
    by_key: dict[str, list[int]] = defaultdict(list)
    for i in range(len(examples)):
        by_key[_key(examples, i)].append(i)
    strata: dict[int, list[list[int]]] = defaultdict(list)
    for group in by_key.values():
        classed = examples.task == "classification" and examples.labels is not None
        strata[int(examples.labels[group[0]]) if classed and examples.labels else 0].append(group)
    return strata


def _key(examples: Examples, i: int) -> str:
    """The row's content, letter case and spaces aside, with a mark between its texts."""
    return "\0".join(" ".join(s.casefold().split()) for s in _strings(examples.content(i)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def require_same_form(train: Examples, evaluation: Examples) -> None:
    """Refuse an evaluation file that does not fit the train file.

    Raises:
        UserError: the task, the form (text, pair, prompt, messages) or the label names differ.
    """
    problems = [
        f"{what}: {ours} in {train.source}, {theirs} in {evaluation.source}"
        for what, ours, theirs in (
            ("task", train.task, evaluation.task),
            ("form", train.form, evaluation.form),
            ("labels", train.label_names, evaluation.label_names),
        )
        if ours != theirs
    ]
    title = "The evaluation data does not fit the train data; name its columns or change the file"
    gather(UserError, title, problems)
