"""Examples: what a table says once its columns, task and labels are settled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rankwise.data.columns import AnyTask, ColumnNames, Columns, find_columns
from rankwise.data.hub import open_table
from rankwise.data.labels import infer_task, read_classes, read_numbers
from rankwise.data.messages import Message, read_messages, text_problem, turn
from rankwise.data.shuffle import permutation
from rankwise.data.table import Table
from rankwise.errors import UserError, gather

__all__ = ["TASKS", "Examples", "Form", "Task", "load_examples"]

Task = Literal["classification", "regression", "causal-lm"]
Form = Literal["text", "pair", "prompt", "messages"]
TASKS: tuple[Task, ...] = ("classification", "regression", "causal-lm")

_PER_ROW = ("texts", "pairs", "prompts", "messages", "labels")


@dataclass(frozen=True)
class Examples:
    """Rows ready for a tokenizer. Every list has one entry per row, or is None.

    Attributes:
        task: what is learned.
        source: the file or dataset, as the user wrote it.
        lines: where each row stands in the source.
        texts: the text, for forms "text" and "pair".
        pairs: the second text, for form "pair".
        prompts: (prompt, completion) used verbatim, for form "prompt"; the completion is ""
            where there is none.
        messages: conversations, for form "messages".
        labels: class numbers, indices into ``label_names``, or for regression floats.
        label_names: the classes, in the order of their numbers.
        unlabelled: rows whose label is not known though others are, when labels may be absent;
            their entry in ``labels`` is 0 and says nothing.
        columns: the columns that were read.
        notes: sentences for the user.

    Raises:
        UserError: the lists do not have one length, or not exactly one form is given.
    """

    task: Task
    source: str
    lines: list[int]
    texts: list[str] | None = None
    pairs: list[str] | None = None
    prompts: list[tuple[str, str]] | None = None
    messages: list[list[Message]] | None = None
    labels: list[int] | list[float] | None = None
    label_names: tuple[str, ...] = ()
    unlabelled: frozenset[int] = frozenset()
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        lengths = {n: len(v) for n in _PER_ROW if (v := getattr(self, n)) is not None}
        if any(n != len(self.lines) for n in lengths.values()):
            raise UserError(f"Examples need lists of {len(self.lines)} rows; got {lengths}.")
        forms = [n for n in ("texts", "prompts", "messages") if n in lengths]
        if len(forms) != 1:
            raise UserError(f"Examples need one of texts, prompts and messages; got {forms}.")

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def form(self) -> Form:
        """Which of the lists hold the input."""
        if self.messages is not None:
            return "messages"
        if self.prompts is not None:
            return "prompt"
        return "text" if self.pairs is None else "pair"

    def name(self, i: int) -> str:
        """Where row ``i`` stands, such as ``train.tsv:17``."""
        return f"{self.source}:{self.lines[i]}"

    def content(self, i: int) -> tuple[Any, ...]:
        """All that the model is shown of row ``i``, without its label."""
        return tuple(v[i] for n in _PER_ROW[:-1] if (v := getattr(self, n)) is not None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over task, label names, and every row's content and label, in order.

        It does not depend on the path, the file format or the machine.
        """
        digest = hashlib.sha256(json.dumps([self.task, self.form, self.label_names]).encode())
        for i in range(len(self)):
            label = None if self.labels is None or i in self.unlabelled else self.labels[i]
            row = json.dumps([self.content(i), label], ensure_ascii=False, sort_keys=True)
            digest.update(b"\n" + row.encode())
        return digest.hexdigest()

    def subset(self, indices: Sequence[int]) -> Examples:
        """The rows ``indices``, in that order, with the same label names."""
        lists = {
            n: [v[i] for i in indices] for n in _PER_ROW if (v := getattr(self, n)) is not None
        }
        unlabelled = frozenset(n for n, i in enumerate(indices) if i in self.unlabelled)
        lines = [self.lines[i] for i in indices]
        return replace(self, lines=lines, unlabelled=unlabelled, **lists)


def load_examples(
    path: str | Path,
    task: AnyTask = "auto",
    columns: ColumnNames | None = None,
    label_names: Sequence[str] | None = None,
    file_format: str | None = None,
    limit: int | None = None,
    require_labels: bool = True,
    fallback: bool = False,
) -> Examples:
    """Read a file, or a dataset of the Hub, into examples.

    The task, when "auto": conversations or prompts and completions are for a language model, and
    so are plain text and a single column of text; numbers that are not whole are for regression;
    other labels are classes. See :func:`rankwise.data.columns.find_columns` for the columns and
    :func:`rankwise.data.hub.open_table` for what ``path`` may be.

    Args:
        path: a file, or ``name[:config][@split]`` on the Hugging Face Hub.
        task: "auto", or one of ``TASKS``.
        columns: column names the user gave.
        label_names: the classes of the train data, for an evaluation file; an unknown label is
            then a fault. None: the file's own labels, of which there must be at least two.
        file_format: overrules the file's suffix.
        limit: keep this many rows: a fixed random sample, in file order.
        require_labels: False for prediction: labels (or completions) may be absent, no row is left
            out, and those whose label cannot be read are ``unlabelled``, with a note.
        fallback: True for an evaluation file; see ``find_columns``.

    Raises:
        UserError: the file, its columns, or any of its rows cannot be used; all bad rows are
            listed as ``file:line``.
        ArtifactError, EnvironmentFault: see ``open_table``.
    """
    if task not in ("auto", *TASKS):
        raise UserError(f"Unknown task '{task}'. Known: auto, {', '.join(TASKS)}.")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more, got {limit}.")
    table = open_table(path, file_format)
    found = find_columns(table, columns, task, require_labels=require_labels, fallback=fallback)
    reader = _Reader(table, found, require_labels)
    examples = reader.read(_settle(task, table, found, label_names), label_names)
    if limit is not None and limit < len(examples):
        rows = sorted(permutation(len(examples), "limit")[:limit])
        note = f"{table.path}: {limit} of {len(examples)} rows are used, a fixed random sample."
        examples = replace(examples.subset(rows), notes=(*examples.notes, note))
    return examples


def _settle(task: AnyTask, table: Table, found: Columns, label_names: Sequence[str] | None) -> Task:
    if task != "auto":
        return task
    if found.label is None:
        return "causal-lm"
    if label_names is not None:
        return "classification"
    return infer_task(row.get(found.label) for row in table.rows)


class _Reader:
    """The rows of one table, with all that is wrong with them."""

    def __init__(self, table: Table, found: Columns, require_labels: bool) -> None:
        self.table = table
        self.found = found
        self.require_labels = require_labels
        self.problems: list[str] = []
        self.notes = list(found.notes)
        self.dropped: set[int] = set()
        self.unlabelled: frozenset[int] = frozenset()

    def read(self, task: Task, label_names: Sequence[str] | None) -> Examples:
        """Examples for ``task``, or one UserError that lists every bad row."""
        found, table = self.found, self.table
        names: tuple[str, ...] = ()
        lists: dict[str, Any] = {}
        if found.messages is not None:
            lists["messages"] = self.messages(found.messages)
        elif found.prompt is not None:
            lists["messages" if found.turns else "prompts"] = self.prompts(found.prompt)
        elif found.text is not None:
            lists["texts"] = self.texts(found.text)
            lists["pairs"] = self.texts(found.pair) if found.pair else None
        if task == "regression" and found.label:
            lists["labels"] = self.numbers(found.label)
        elif task == "classification" and found.label:
            lists["labels"], names = self.classes(found.label, label_names)
        title = f"{table.path} has rows that cannot be used; correct or remove them"
        gather(UserError, title, self.problems)
        if len(names) == 1 and label_names is None and self.require_labels:
            raise UserError(
                f"{table.path}: column '{found.label}' holds the one label '{names[0]}' in every "
                "row, and a classifier needs two or more. Add rows of another class, or name "
                "another column with --label-column."
            )
        if not table.named:
            self.notes.append(f"{table.path}: each line is one example; blank lines are skipped.")
        examples = Examples(
            task=task,
            source=table.path,
            lines=table.lines,
            label_names=tuple(label_names) if label_names and task == "classification" else names,
            unlabelled=self.unlabelled,
            columns=found.used(),
            notes=tuple(self.notes),
            **lists,
        )
        return self.without_dropped(examples)

    def without_dropped(self, examples: Examples) -> Examples:
        if not self.dropped:
            return examples
        kept = [i for i in range(len(examples)) if i not in self.dropped]
        if not kept:
            raise UserError(
                f"{self.table.path}: no row has an agreed label in '{self.found.label}'; every one "
                "is '-'. Choose a file or a split with labels."
            )
        return examples.subset(kept)

    def text(self, i: int, column: str, optional: bool = False) -> str:
        value: Any = self.table.rows[i].get(column)
        if optional and (value is None or value == ""):
            return ""
        problem = text_problem(value)
        if problem:
            self.problems.append(f"{self.table.name(i)}: '{column}' {problem}")
            return ""
        return value

    def texts(self, column: str) -> list[str]:
        return [self.text(i, column) for i in range(len(self.table))]

    def messages(self, column: str) -> list[list[Message]]:
        result: list[list[Message]] = []
        for i, row in enumerate(self.table.rows):
            messages, problem = read_messages(row.get(column), self.require_labels)
            if problem:
                self.problems.append(f"{self.table.name(i)}: '{column}' {problem}")
            result.append(messages)
        return result

    def prompts(self, column: str) -> list[list[Message]] | list[tuple[str, str]]:
        """Verbatim pairs, or one-turn conversations where the columns are a question's."""
        found, rows = self.found, range(len(self.table))
        asked = [self.text(i, column) for i in rows]
        answers = [""] * len(asked)
        if found.completion is not None:
            answers = [self.text(i, found.completion, not self.require_labels) for i in rows]
        if not found.turns:
            return list(zip(asked, answers, strict=True))
        contexts = [self.text(i, found.context, True) if found.context else "" for i in rows]
        three = zip(asked, contexts, answers, strict=True)
        return [turn(q, context, a or None) for q, context, a in three]

    def numbers(self, column: str) -> list[float] | None:
        read = read_numbers(self.table, column)
        if not self.usable(column, read.values, read.problems):
            return None
        return [0.0 if v is None else v for v in read.values]

    def classes(
        self, column: str, known: Sequence[str] | None
    ) -> tuple[list[int] | None, tuple[str, ...]]:
        read = read_classes(self.table, column, known)
        if not self.usable(column, read.values, read.problems):
            return None, ()
        where = f"{self.table.path}: column '{column}'"
        if read.dropped and self.require_labels:
            self.dropped.update(read.dropped)
            self.notes.append(
                f"{where} is '-' (no agreed label) in {len(read.dropped)} of "
                f"{len(self.table)} rows, which are left out."
            )
        if known is None and len(read.names) > 20 and len(read.names) * 2 > len(self.table):
            self.notes.append(
                f"{where} holds {len(read.names)} different labels in {len(self.table)} rows. If "
                "they are quantities, pass --task regression; if they are no labels, name another "
                "column with --label-column."
            )
        return [0 if v is None else v for v in read.values], read.names

    def usable(self, column: str, values: Sequence[float | None], problems: list[str]) -> bool:
        """Record label problems; False where labels may be absent and none can be read."""
        if self.require_labels:
            self.problems += problems
            return True
        unknown = frozenset(i for i, value in enumerate(values) if value is None)
        if not unknown:
            return True
        why = f": {problems[0]}" if problems else " (it is '-')."
        if len(unknown) == len(values):
            self.notes.append(
                f"The labels in '{column}' are left out, because none can be read{why}"
            )
            return False
        self.unlabelled = unknown
        self.notes.append(
            f"{self.table.path}: {len(unknown)} of {len(values)} rows have no known label in "
            f"'{column}' and are left out of the metrics{why}"
        )
        return True
