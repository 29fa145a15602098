"""Examples written as a file of JSON lines that reads back as the same examples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rankwise.data.examples import Examples
from rankwise.errors import UserError

__all__ = ["json_lines"]


def json_lines(examples: Examples) -> str:
    """The rows as one JSON object a line, under the column names that are found by convention.

    :func:`rankwise.data.examples.load_examples` with the task of the examples reads the same
    content, labels and label names back, and so the same fingerprint. A class without a row is
    known again only where its name is given; the notes and where the rows once stood are not kept.

    Raises:
        UserError: a row has no known label.
    """
    if examples.unlabelled:
        raise UserError(f"{len(examples.unlabelled)} rows of {examples.source} have no label.")
    return "".join(
        json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in _rows(examples)
    )


def _rows(examples: Examples) -> Iterator[dict[str, Any]]:
    for i in range(len(examples)):
        row: dict[str, Any] = {}
        if examples.messages is not None:
            row["messages"] = examples.messages[i]
        if examples.prompts is not None:
            row["prompt"], row["completion"] = examples.prompts[i]
        if examples.texts is not None:
            row["text"] = examples.texts[i]
        if examples.pairs is not None:
            row["text_pair"] = examples.pairs[i]
        if examples.labels is not None:
            label = examples.labels[i]
            row["label"] = examples.label_names[int(label)] if examples.label_names else label
        yield row
