"""Values of a label column to class numbers or finite numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rankwise.data.table import Table
from rankwise.errors import nearest

__all__ = ["Classes", "Numbers", "infer_task", "read_classes", "read_numbers"]

NO_AGREEMENT = "-"  # SNLI's and MNLI's gold_label where the annotators disagreed
_WHOLE = re.compile(r"(-?\d+)(\.0*)?")


@dataclass(frozen=True)
class Classes:
    """A label column read as classes.

    Attributes:
        names: the classes; a label is an index into them.
        values: per row the class, or None where the row has no usable label.
        dropped: rows without an agreed label, which are left out rather than refused.
        problems: one sentence per row that cannot be used.
    """

    names: tuple[str, ...]
    values: list[int | None]
    dropped: list[int]
    problems: list[str]


@dataclass(frozen=True)
class Numbers:
    """A label column read as quantities; None and a problem where a row has no finite number."""

    values: list[float | None]
    problems: list[str]


def infer_task(values: Iterable[Any]) -> Literal["classification", "regression"]:
    """Regression when most labels are numbers and some are not whole; else classification."""
    present = [v for v in values if _name(v)]
    numbers = [n for n in map(_number, present) if n is not None]
    broken = any(not n.is_integer() for n in numbers if math.isfinite(n))
    return "regression" if broken and len(numbers) * 2 > len(present) else "classification"


def read_numbers(table: Table, column: str) -> Numbers:
    """Every label as a float; text such as "3.8" counts as a number, true and false do not."""
    values: list[float | None] = []
    problems: list[str] = []
    for i, row in enumerate(table.rows):
        raw = row.get(column)
        number = _number(raw)
        if number is None or not math.isfinite(number):
            problem = "is missing" if _absent(raw) else f"{raw!r} is not a finite number"
            problems.append(f"{table.name(i)}: label '{column}' {problem}")
            number = None
        values.append(number)
    return Numbers(values, problems)


def read_classes(table: Table, column: str, known: Sequence[str] | None) -> Classes:
    """Every label as a class number.

    Without ``known`` the classes are the different labels of the column: in numerical order when
    all are whole numbers (1 and "1.0" are the same label), else in alphabetical order. With
    ``known``, the train file's classes, a label is found by its exact name, or by the same number
    or the same letters in another case where that is unambiguous.
    """
    names = [_name(row.get(column)) for row in table.rows]
    distinct = {n for n in names if n}
    disagreed = (
        NO_AGREEMENT not in known
        if known is not None
        else len(distinct - {NO_AGREEMENT}) >= 2 and "+" not in distinct
    )
    skipped = {NO_AGREEMENT} if disagreed else set[str]()
    classes = tuple(known) if known is not None else _order(distinct - skipped)
    find = _finder(classes)
    values: list[int | None] = []
    dropped: list[int] = []
    problems: list[str] = []
    for i, name in enumerate(names):
        found = find(name) if name else None
        if name in skipped:
            dropped.append(i)
        elif found is None:
            problem = _class_problem(table.rows[i].get(column), name, classes)
            problems.append(f"{table.name(i)}: label '{column}' {problem}")
        values.append(found)
    return Classes(classes, values, dropped, problems)


def _absent(value: Any) -> bool:
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


def _name(value: Any) -> str | None:
    """A label's name as text; None when it is absent or of a type that names nothing."""
    if _absent(value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() if isinstance(value, (str, int, float)) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _order(names: set[str]) -> tuple[str, ...]:
    whole = {name: _WHOLE.fullmatch(name) for name in names}
    if all(whole.values()):
        numbers = {int(m[1]) for m in whole.values() if m}
        return tuple(str(n) for n in sorted(numbers))
    return tuple(sorted(names))


def _finder(classes: Sequence[str]) -> Callable[[str], int | None]:
    """Finds a class by its exact name, else by number, else by letters, where only one fits."""
    exact = {name: i for i, name in enumerate(classes)}
    looser: list[tuple[Callable[[str], str], dict[str, int]]] = []
    for form in (_whole, str.casefold):
        forms = [form(name) for name in classes]
        counts = Counter(forms)
        looser.append((form, {f: i for i, f in enumerate(forms) if counts[f] == 1}))

    def find(name: str) -> int | None:
        if name in exact:
            return exact[name]
        return next((index[form(name)] for form, index in looser if form(name) in index), None)

    return find


def _whole(name: str) -> str:
    """A whole number in its plain form, "1" for "1.0" and "01"; any other name as it is."""
    found = _WHOLE.fullmatch(name)
    return str(int(found[1])) if found else name


def _class_problem(value: Any, name: str | None, classes: Sequence[str]) -> str:
    if _absent(value):
        return "is missing"
    if name is None:
        return f"is a {type(value).__name__}, not a class name or number"
    listed = ", ".join(f"'{c}'" for c in classes[:12]) + (", ..." if len(classes) > 12 else "")
    return f"'{name}' is not one of the known labels {listed}.{nearest(name, classes)}"
