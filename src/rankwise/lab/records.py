"""Run folders read into frozen records: what was trained, how, on what, and what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import ArtifactError, UserError, gather
from rankwise.lab.run_files import (
    EVENTS,
    MANIFEST,
    PLAIN,
    EvalEvent,
    TrainEvent,
    floats,
    read_events,
    read_manifest,
)
from rankwise.train import answers as row_answers
from rankwise.train.answers import Answers, read_answers

__all__ = [
    "Counts",
    "EvalEvent",
    "RunRecord",
    "TrainEvent",
    "in_order",
    "printable",
    "read_run",
    "read_runs",
]


@dataclass(frozen=True)
class Counts:
    """Parameters of one run.

    ``adapter_formula`` is what the method's formula promises for ``adapter`` (for LoRA the sum of
    r · (in + out), docs/math.md (3)), or None when the method has no formula.
    """

    base: int
    adapter: int
    adapter_formula: int | None
    head: int
    trainable: int

    @property
    def share(self) -> float:
        """Trained parameters as a fraction of the parameters of the base."""
        return self.trainable / self.base


@dataclass(frozen=True)
class RunRecord:
    """One training run as its folder tells it: the manifest and the logged events.

    ``metrics`` are those of the adapter that was kept, on the evaluation data; a value may be NaN.
    ``seconds`` holds wall time under "train" and "eval". ``peak_bytes`` is the most memory held by
    ``peak_of``, "process" or "device"; None when not known. ``diverged`` is true of a run that
    failed because its loss or gradients were no finite numbers. ``together`` is how many runs
    trained in one process and shared their passes through the base: 1 for a run alone. ``answers``
    are those of the kept adapter to each evaluation row; None where the run has left none.
    ``folder`` is where the record was read from, and takes no part in comparisons or in a report.
    """

    name: str
    method: Mapping[str, Any]
    config: Mapping[str, Any]
    seed: int
    task: str
    metric: str
    metrics: Mapping[str, float]
    counts: Counts
    seconds: Mapping[str, float]
    artifact_bytes: int | None
    peak_bytes: int | None
    peak_of: str | None
    diverged: bool
    together: int
    status: str
    data: Mapping[str, Any]
    base: Mapping[str, Any]
    code: Mapping[str, Any]
    versions: Mapping[str, Any]
    hardware: Mapping[str, Any]
    notes: tuple[str, ...]
    training: tuple[TrainEvent, ...]
    evaluations: tuple[EvalEvent, ...]
    folder: Path = field(compare=False)
    answers: Answers | None = field(default=None, compare=False, repr=False)

    @property
    def kind(self) -> str:
        """The method's own word: "lora", "head", "full", ..."""
        return self.method["method"]

    @property
    def rank(self) -> int | None:
        """r of a LoRA run; None for any other method."""
        return self.method["r"] if self.kind == "lora" else None

    @property
    def alpha(self) -> float | None:
        """α of a LoRA run; None for any other method."""
        return float(self.method["alpha"]) if self.kind == "lora" else None

    @property
    def score(self) -> float:
        """The metric the run is judged by; NaN when it was never measured or is not finite."""
        value = self.metrics.get(self.metric, math.nan)
        return value if math.isfinite(value) else math.nan

    @property
    def evaluation_rows(self) -> int | None:
        """Rows behind ``score``; None when the run had no evaluation data."""
        return self.data["eval"]["rows"] if self.data["eval"] is not None else None

    @property
    def usable(self) -> bool:
        """True when the run is finished and has a finite score, so that claims may rest on it."""
        return self.status == "finished" and math.isfinite(self.score)

    @property
    def kept_last(self) -> bool:
        """True when the run kept what it had after its last step, whatever its evaluations said."""
        return self.config.get("select") == "last"

    @cached_property
    def contributions(self) -> NDArray[np.float64] | None:
        """What each evaluation row adds to the score, (n,); None when that is not known."""
        return None if self.answers is None else self.answers.contributions(self.metric)


def in_order(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """The runs from the fewest trained parameters up, then by rank, name, seed and options."""

    def key(run: RunRecord) -> tuple[int, int, str, int, str]:
        options = json.dumps([run.method, run.config], sort_keys=True, default=str)
        return (run.counts.trainable, run.rank or 0, run.name, run.seed, options)

    return sorted(runs, key=key)


def printable(text: str) -> str:
    """The text with every character that a terminal or a page could not show replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def read_run(folder: str | Path) -> RunRecord:
    """Read one run folder: its manifest.json, its metrics.jsonl and the answers to the rows.

    The last line of metrics.jsonl may be cut, as a crash leaves it; it is left out. Where a run
    was resumed and steps were logged twice, the later line counts. A run that is not finished may
    have no metrics.jsonl yet.

    Raises:
        UserError: there is no such folder, or it holds no run.
        ArtifactError: a file is damaged or lacks a part; all that is wrong is listed.
    """
    folder = Path(folder)
    manifest, events = folder / MANIFEST, folder / EVENTS
    if not folder.is_dir():
        raise UserError(f"There is no run folder {folder}. Give the folder a training run wrote.")
    if not manifest.is_file() and not events.is_file():
        raise UserError(
            f"{folder} is not a run folder: it holds no {MANIFEST}. "
            "Give the folder a training run wrote."
        )
    values = read_manifest(manifest)
    begun = events.is_file() or values["status"] == "finished"
    training, evaluations = read_events(events) if begun else ((), ())
    memory = values["memory"] or {"peak": None, "of": None}
    return RunRecord(
        **{name: values[name] for name in PLAIN},
        peak_bytes=memory["peak"],
        peak_of=memory["of"],
        metrics=floats(values["metrics"]),
        counts=Counts(**{name: values[f"counts.{name}"] for name in Counts.__dataclass_fields__}),
        seconds=floats(values["seconds"]),
        notes=tuple(values["notes"]),
        training=training,
        evaluations=evaluations,
        folder=folder,
        answers=_read_answers(folder, values),
    )


def _read_answers(folder: Path, values: Mapping[str, Any]) -> Answers | None:
    path = folder / row_answers.NAME
    if values["data"]["eval"] is None or not path.is_file():
        return None
    return read_answers(path, values["data"]["eval"]["fingerprint"])


def read_runs(folder: str | Path) -> list[RunRecord]:
    """Read every run folder directly inside ``folder``, or ``folder`` itself when it is a run.

    Folders that hold neither a manifest.json nor a metrics.jsonl are not runs and are passed
    over. The records come ordered by trained parameters, then name, then seed.

    Raises:
        UserError: there is no such folder, or no run in it.
        ArtifactError: one or more runs are damaged; all of them are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give the folder that holds the run folders.")
    if _is_run(folder):
        return [read_run(folder)]
    records: list[RunRecord] = []
    problems: list[str] = []
    inside = sorted(child for child in folder.iterdir() if child.is_dir() and _is_run(child))
    for child in inside:
        try:
            records.append(read_run(child))
        except ArtifactError as error:
            problems.append(str(error))
    gather(ArtifactError, f"Damaged runs in {folder}", problems)
    if not records:
        raise UserError(
            f"{folder} holds no run: no folder in it has a {MANIFEST}. "
            "Give the folder that holds the run folders, or train first."
        )
    return in_order(records)


def _is_run(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or (folder / EVENTS).is_file()
