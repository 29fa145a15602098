"""Which column of a table is what, by the user's flags or by convention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from rankwise.data.parsers import looks_like_data
from rankwise.data.table import Table
from rankwise.errors import UserError, gather, nearest

__all__ = ["AnyTask", "ColumnNames", "Columns", "find_columns"]

AnyTask = Literal["auto", "classification", "regression", "causal-lm"]

# Conventions, in lower case. Within one tuple no name is better than another, so two at once are
# ambiguous; an earlier tuple wins over a later one.
MESSAGES = ("messages", "conversations", "conversation")
VERBATIM = (("prompt", "completion"),)
TURNS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
    ("inputs", "targets"),
)
CONTEXTS = ("input", "context")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
    ("#1 string", "#2 string"),
    ("question", "answer"),
)
TEXTS = (
    ("text", "sentence", "content", "review", "document"),
    ("question", "query", "comment", "tweet", "utterance", "headline", "description", "body"),
)
LABELS = (
    ("label", "labels", "gold_label", "class", "class index", "target"),
    ("score", "similarity", "category", "sentiment", "is_duplicate", "quality", "rating", "intent"),
)
NUMBERS = ("id", "idx", "index", "guid", "uid", "line")


@dataclass(frozen=True)
class ColumnNames:
    """The column names a user gave, one per flag (``--text-column`` and so on); None: not given."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None


@dataclass(frozen=True)
class Columns(ColumnNames):
    """The columns that will be read; exactly one of text, prompt and messages is set.

    Attributes:
        text, pair: one text, or a pair of texts.
        label: the class or the number; with ``text`` only.
        prompt, completion: what the model is given and what it is to answer.
        turns: prompt and completion are one question and one answer of a conversation, to be
            written in the model's chat format; otherwise they are used verbatim.
        context: more text for the question, such as Alpaca's "input".
        messages: whole conversations.
        notes: sentences for the user about choices that were not asked for.
    """

    turns: bool = False
    context: str | None = None
    notes: tuple[str, ...] = ()

    def used(self) -> tuple[str, ...]:
        """The names of the columns that are read."""
        names = (self.messages, self.prompt, self.context, self.completion)
        return tuple(n for n in (*names, self.text, self.pair, self.label) if n is not None)


def find_columns(
    table: Table,
    wanted: ColumnNames | None = None,
    task: AnyTask = "auto",
    *,
    require_labels: bool = True,
    fallback: bool = False,
) -> Columns:
    """Decide which columns of ``table`` are read.

    A column the user named is taken. The others are found by name: conversations ("messages"),
    prompt and completion, question and answer (also "instruction" with "output", and their
    like), a pair of texts ("sentence1" with "sentence2", "premise" with "hypothesis", ...), or
    one text ("text", "sentence", "content", "review", ...) with a label ("label", "gold_label",
    "target", ...). Case does not matter. Without any known name, the only column that holds words
    is the text. A file of one text column and no label is for a language model.

    ``task`` narrows the search; "auto" takes what the columns say. ``require_labels`` is False
    when labels or completions may be absent. ``fallback`` is True for an evaluation file: a named
    column that it lacks is looked for by convention, with a note, because train and dev files do
    not always agree.

    Raises:
        UserError: a named column is absent, two columns could be meant, or none is found.
    """
    finder = _Finder(table, require_labels)
    named, notes = _named(table, wanted or ColumnNames(), fallback)
    labelled = named.text or named.pair or named.label
    if (task == "causal-lm" and not named.text) or (task == "auto" and not labelled):
        found = finder.conversation(named)
        asked = named.messages or named.prompt or named.completion
        if found and task == "auto" and not asked and finder.tiers(LABELS[:1]):
            raise finder.fault(
                f"columns {finder.quoted(found.used())} are for a language model and "
                f"{finder.quoted(finder.tiers(LABELS[:1]))} for a classifier; say which is meant "
                "with --task causal-lm or --task classification"
            )
        if found:
            return replace(found, notes=(*notes, *found.notes))
    if task == "causal-lm":
        found = Columns(text=named.text) if named.text else finder.one_text(())
    else:
        found = finder.label(finder.text(named), named, task)
    return replace(found, notes=(*notes, *found.notes))


def _named(table: Table, wanted: ColumnNames, fallback: bool) -> tuple[ColumnNames, list[str]]:
    """The user's names less those the table lacks, which are faults unless ``fallback``."""
    missing = {
        field.name: getattr(wanted, field.name)
        for field in fields(ColumnNames)
        if getattr(wanted, field.name) not in (None, *table.columns)
    }
    notes: list[str] = []
    problems: list[str] = []
    for role, name in missing.items():
        have = ", ".join(f"'{c}'" for c in table.columns)
        if fallback:
            notes.append(
                f"{table.path} has no column '{name}' (--{role}-column); its {role} column is "
                "found by convention instead."
            )
        else:
            problems.append(
                f"--{role}-column {name}: there is no such column; the file has {have}."
                f"{nearest(name, table.columns)}"
            )
    gather(UserError, f"{table.path}", problems)
    return replace(wanted, **dict.fromkeys(missing)), notes


class _Finder:
    """The search in one table."""

    def __init__(self, table: Table, require_labels: bool) -> None:
        self.table = table
        self.require_labels = require_labels
        self.by_lower = {c.lower(): c for c in reversed(table.columns)}

    def fault(self, problem: str) -> UserError:
        table = self.table
        hint = ""
        if table.named and looks_like_data(table.columns):
            hint = " The first line must name the columns, and this one looks like data."
        return UserError(
            f"{table.path}: {problem}. Its columns are {self.quoted(table.columns)}.{hint}"
        )

    @staticmethod
    def quoted(names: Iterable[str]) -> str:
        return ", ".join(f"'{name}'" for name in names)

    def get(self, name: str) -> str | None:
        return self.by_lower.get(name)

    def tiers(
        self, tiers: Sequence[Sequence[str]], besides: Sequence[str | None] = ()
    ) -> list[str]:
        """The columns of the first tier that has any."""
        for tier in tiers:
            found = [c for c in map(self.get, tier) if c is not None and c not in besides]
            if found:
                return found
        return []

    def holds(self, column: str | None, kind: type) -> bool:
        """Whether the first value that is not null in ``column`` is a ``kind``."""
        values = (row.get(column) for row in self.table.rows) if column else iter(())
        return isinstance(next((v for v in values if v is not None), None), kind)

    def conversation(self, named: ColumnNames) -> Columns | None:
        """Messages, or prompt and completion; None when the table has neither."""
        if named.messages:
            return Columns(messages=named.messages)
        if named.prompt or named.completion:
            return self.completion(named)
        for name in map(self.get, MESSAGES):
            if self.holds(name, list):
                return Columns(messages=name)
        for turns, pairs in ((False, VERBATIM), (True, TURNS)):
            for first, second in pairs:
                prompt, completion = self.get(first), self.get(second)
                if self.holds(prompt, str) and self.holds(completion, str):
                    return self.turn(prompt, completion, turns)
        if not self.require_labels:
            for turns, name in ((False, "prompt"), (True, "instruction")):
                if self.holds(self.get(name), str):
                    return self.turn(self.get(name), None, turns)
        return None

    def turn(self, prompt: str | None, completion: str | None, turns: bool) -> Columns:
        context = None
        if turns and prompt is not None and prompt.lower() == "instruction":
            context = next(iter(self.tiers([CONTEXTS], (prompt, completion))), None)
        return Columns(prompt=prompt, completion=completion, turns=turns, context=context)

    def completion(self, named: ColumnNames) -> Columns:
        """The user named one of prompt and completion, or both; verbatim when both."""
        if named.prompt and named.completion:
            return Columns(prompt=named.prompt, completion=named.completion)
        for turns, pairs in ((False, VERBATIM), (True, TURNS)):
            for prompt, completion in pairs:
                if named.prompt and named.prompt.lower() == prompt and self.get(completion):
                    return self.turn(named.prompt, self.get(completion), turns)
                if named.completion and named.completion.lower() == completion and self.get(prompt):
                    return self.turn(self.get(prompt), named.completion, turns)
        if named.prompt and not self.require_labels:
            return Columns(prompt=named.prompt)
        other = "completion" if named.prompt else "prompt"
        raise self.fault(f"no {other} column is found; name it with --{other}-column")

    def text(self, named: ColumnNames) -> Columns:
        """One text or a pair of texts."""
        if named.text:
            return Columns(text=named.text, pair=named.pair)
        pairs = [(self.get(a), self.get(b)) for a, b in PAIRS]
        pairs = [(a, b) for a, b in pairs if a and b and named.label not in (a, b)]
        if named.pair:
            partners = [a for a, b in pairs if b == named.pair]
            if partners:
                return Columns(text=partners[0], pair=named.pair)
            return replace(self.one_text((named.pair, named.label)), pair=named.pair)
        if len(pairs) > 1:
            raise self.fault(
                f"{' and '.join(f'({self.quoted(p)})' for p in pairs)} could each be the pair of "
                "texts; name them with --text-column and --pair-column"
            )
        if pairs:
            return Columns(text=pairs[0][0], pair=pairs[0][1])
        return self.one_text((named.label,))

    def one_text(self, besides: Sequence[str | None]) -> Columns:
        """The one column that can be the text, or a fault."""
        known = self.tiers(TEXTS, besides)
        if len(known) == 1:
            return Columns(text=known[0])
        taken = (*besides, *self.tiers(LABELS))
        found = known or [c for c in self.table.columns if c not in taken and self.wordy(c)]
        if len(found) == 1:
            note = (
                f"{self.table.path}: the text is read from '{found[0]}', the only column that "
                "holds words (--text-column names another)."
            )
            return Columns(text=found[0], notes=(note,))
        which = f"{self.quoted(found)} could each be the text" if found else "no column of text"
        raise self.fault(
            f"{which}; name it with --text-column, and a second text with --pair-column"
        )

    def wordy(self, column: str) -> bool:
        """Whether the values look like text rather than numbers, names of classes or ids."""
        if column.lower() in NUMBERS:
            return False
        values = [row.get(column) for row in self.table.rows[:100]]
        words = [v for v in values if isinstance(v, str) and any(c.isalpha() for c in v)]
        return len(words) * 2 > len(values) and any(" " in v.strip() for v in words)

    def label(self, found: Columns, named: ColumnNames, task: AnyTask) -> Columns:
        """``found`` with its label column; without one where none is needed."""
        if named.label:
            return replace(found, label=named.label)
        labels = self.tiers(LABELS, (found.text, found.pair))
        if len(labels) == 1:
            return replace(found, label=labels[0])
        if len(labels) > 1:
            raise self.fault(
                f"{self.quoted(labels)} could each be the label; name it with --label-column"
            )
        rest = [c for c in self.table.columns if c != found.text and c.lower() not in NUMBERS]
        if not self.require_labels or (task == "auto" and not found.pair and not rest):
            return found
        raise self.fault(
            "no label column is found; name it with --label-column, or train a language model on "
            "the text with --task causal-lm"
        )
