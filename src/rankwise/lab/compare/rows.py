"""The rows of a comparison: cut into parts once, and written down for every run to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.data.examples import Examples
from rankwise.data.saving import json_lines
from rankwise.data.splits import split
from rankwise.errors import UserError, gather
from rankwise.io import files
from rankwise.lab.compare.options import CompareConfig
from rankwise.train.setup import Data

__all__ = ["Part", "cut", "intact", "rows_file", "write_rows"]


@dataclass(frozen=True)
class Part:
    """One file of rows: how many, their fingerprint, and the SHA-256 of the file."""

    rows: int
    fingerprint: str
    sha256: str


def rows_file(folder: Path, part: str) -> Path:
    """Where a part of the rows of the comparison in a folder is."""
    return folder / "data" / f"{part}.jsonl"


def cut(data: Data, config: CompareConfig, seed: int) -> dict[str, Examples]:
    """The parts by name: train and eval, and search-train and search-eval, both cut from train.

    Raises:
        UserError: there are too few rows to cut, or a class has none to learn from.
    """
    fraction = min(config.tuning_fraction, config.tuning_rows / len(data.train))
    fitting, tuning = split(data.train, fraction, seed)
    if config.search_rows is not None and config.search_rows < len(fitting):
        _, fitting = split(fitting, config.search_rows / len(fitting), seed)
    problems = [*_unseen("train", data.train), *_unseen("search-train", fitting)]
    gather(
        UserError,
        "There are too few rows for a comparison; take more, as with a larger --limit",
        problems,
    )
    searched = {"search-train": fitting, "search-eval": tuning}
    return {"train": data.train, "eval": data.held, **searched}


def _unseen(name: str, examples: Examples) -> list[str]:
    """The classes that none of the rows belongs to, so that nothing could be learned of them."""
    seen = {int(label) for label in examples.labels or ()}
    unseen = [n for i, n in enumerate(examples.label_names) if i not in seen]
    rows = f"the {len(examples):,} rows of {name}"
    return [f"none of {rows} is of class '{n}'." for n in unseen[:6]]


def write_rows(
    folder: Path, parts: Mapping[str, Examples], *, keep: bool = False
) -> dict[str, Part]:
    """Write every part below the folder of a comparison.

    Raises:
        UserError: with ``keep``, a file is in a part's place that holds something else.
    """
    texts = {name: json_lines(examples) for name, examples in parts.items()}
    for name, text in texts.items() if keep else ():
        file = rows_file(folder, name)
        if file.exists() and not (file.is_file() and file.read_bytes() == text.encode("utf-8")):
            raise UserError(
                f"'{file}' is in the place of rows that the comparison would write. Name another "
                "--out, or move it away."
            )
    written: dict[str, Part] = {}
    for name, examples in parts.items():
        file = files.write_text(rows_file(folder, name), texts[name])
        written[name] = Part(len(examples), examples.fingerprint, files.sha256_file(file))
    return written


def intact(folder: Path, parts: Mapping[str, Part]) -> bool:
    """Whether every part is there as it was written."""
    return all(
        (file := rows_file(folder, name)).is_file() and files.sha256_file(file) == part.sha256
        for name, part in parts.items()
    )
