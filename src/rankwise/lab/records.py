"""Run folders read into frozen records: what was trained, how, on what, and what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.errors import ArtifactError, UserError, gather

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

FORMAT = 1
MANIFEST = "manifest.json"
EVENTS = "metrics.jsonl"
STATUSES = ("finished", "interrupted", "failed", "running")


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
class TrainEvent:
    """One training entry of the log; ``loss`` may be NaN, ``skipped`` counts steps up to here."""

    step: int
    epoch: float
    loss: float
    skipped: int


@dataclass(frozen=True)
class EvalEvent:
    """One evaluation during training; ``metrics`` maps each metric's name to its value."""

    step: int
    epoch: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """One training run as its folder tells it: the manifest and the logged events.

    ``metrics`` are those of the best checkpoint on the evaluation data; a value may be NaN.
    ``seconds`` holds wall time under "train" and "eval". ``folder`` is where the record was read
    from, and takes no part in comparisons or in a report.
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
    """Read one run folder: its manifest.json and its metrics.jsonl.

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
    values = _read_manifest(manifest)
    begun = events.is_file() or values["status"] == "finished"
    training, evaluations = _read_events(events) if begun else ((), ())
    return RunRecord(
        **{name: values[name] for name in _PLAIN},
        metrics=_floats(values["metrics"]),
        counts=Counts(**{name: values[f"counts.{name}"] for name in Counts.__dataclass_fields__}),
        seconds=_floats(values["seconds"]),
        notes=tuple(values["notes"]),
        training=training,
        evaluations=evaluations,
        folder=folder,
    )


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


def _of(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_is_text, _is_whole, _is_number, _is_mapping = _of(str), _of(int), _of(int, float), _of(dict)


def _is_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(v is None or _is_number(v) for v in value.values())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _optional(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


_PLAIN = (
    *("name", "method", "config", "seed", "task", "metric", "artifact_bytes", "status"),
    *("data", "base", "code", "versions", "hardware"),
)
_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "name": (_is_text, "text"),
    "method": (_is_mapping, "an object"),
    "method.method": (_is_text, "text"),
    "config": (_is_mapping, "an object"),
    "seed": (_is_whole, "a whole number"),
    "task": (_is_text, "text"),
    "metric": (_is_text, "text"),
    "metrics": (_is_numbers, "an object of numbers"),
    "counts": (_is_mapping, "an object"),
    "counts.base": (lambda value: _is_count(value) and value != 0, "a whole number of 1 or more"),
    "counts.adapter": (_is_count, "a whole number of 0 or more"),
    "counts.adapter_formula": (_optional(_is_count), "a whole number of 0 or more, or null"),
    "counts.head": (_is_count, "a whole number of 0 or more"),
    "counts.trainable": (_is_count, "a whole number of 0 or more"),
    "seconds": (_is_numbers, "an object of numbers"),
    "seconds.train": (_is_number, "a number of seconds"),
    "seconds.eval": (_optional(_is_number), "a number of seconds, or null"),
    "artifact_bytes": (_optional(_is_count), "a whole number of bytes, or null"),
    "status": (lambda value: value in STATUSES, "one of " + ", ".join(STATUSES)),
    "data": (_is_mapping, "an object"),
    "data.train": (_is_mapping, "an object"),
    "data.train.source": (_is_text, "text"),
    "data.train.rows": (_is_count, "a whole number of 0 or more"),
    "data.train.fingerprint": (_is_text, "text"),
    "data.eval": (_optional(_is_mapping), "an object, or null"),
    "data.eval.source": (_is_text, "text"),
    "data.eval.rows": (_is_count, "a whole number of 0 or more"),
    "data.eval.fingerprint": (_is_text, "text"),
    "base": (_is_mapping, "an object"),
    "base.source": (_is_text, "text"),
    "base.fingerprint": (_is_text, "text"),
    "code": (_is_mapping, "an object"),
    "versions": (_is_mapping, "an object"),
    "hardware": (_is_mapping, "an object"),
    "notes": (_is_texts, "a list of texts"),
}
_LORA_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "method.r": (lambda value: _is_count(value) and value != 0, "a whole number of 1 or more"),
    "method.alpha": (_is_number, "a number"),
}
_EVENT_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "step": (_is_count, "a whole number of 0 or more"),
    "epoch": (_is_finite, "a finite number"),
}
_TRAIN_FIELDS = {**_EVENT_FIELDS, "loss": (_optional(_is_number), "a number, or null")}


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's values by dotted name, every documented one present and of its kind."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing, though the run's events are there. Train again.")
    try:
        tree = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(
            f"{path} is damaged and cannot be read as JSON ({error}). "
            "Restore the file, or run the training again."
        ) from error
    if not isinstance(tree, dict):
        raise ArtifactError(f"{path} must hold a JSON object, got {type(tree).__name__}.")
    if tree.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {tree.get('format')!r}, and this version of Rankwise reads "
            f"format {FORMAT}. Read it with the version that wrote it, or train again."
        )
    values: dict[str, Any] = {}
    problems = _check(tree, _FIELDS, values)
    if values.get("method.method") == "lora":
        problems += _check(tree, _LORA_FIELDS, values)
    gather(ArtifactError, f"{path} is not a complete record of a run", problems)
    return values


def _check(
    tree: Mapping[str, Any],
    fields: Mapping[str, tuple[Callable[[object], bool], str]],
    values: dict[str, Any],
) -> list[str]:
    """Collect ``fields`` of ``tree`` into ``values`` and return what is wrong with them."""
    problems: list[str] = []
    for dotted, (accepts, words) in fields.items():
        parent, _, last = dotted.rpartition(".")
        inside: Any = values.get(parent) if parent else tree
        if not isinstance(inside, dict):
            continue  # the parent itself is missing, null or already reported
        if last not in inside:
            problems.append(f"'{dotted}' is missing; it must be {words}.")
        elif not accepts(inside[last]):
            problems.append(f"'{dotted}' must be {words}, got {inside[last]!r:.80}.")
        else:
            values[dotted] = inside[last]
    return problems


def _floats(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """The numbers as floats, with null as NaN."""
    return {k: math.nan if v is None else float(v) for k, v in numbers.items()}


def _read_events(path: Path) -> tuple[tuple[TrainEvent, ...], tuple[EvalEvent, ...]]:
    """The training and evaluation events of a metrics.jsonl; other events are passed over."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing, though the run's {MANIFEST} is there.")
    lines = path.read_bytes().split(b"\n")
    training: list[TrainEvent] = []
    evaluations: list[EvalEvent] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            event = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # cut by a crash: the newline that ends a whole line never came
            raise ArtifactError(
                f"{where} is damaged and cannot be read as JSON ({error}). Only the last line "
                "may be cut. Restore the file, or run the training again."
            ) from error
        _take_event(event, where, training, evaluations)
    return tuple(training), tuple(evaluations)


def _take_event(
    event: Any, where: str, training: list[TrainEvent], evaluations: list[EvalEvent]
) -> None:
    """Append one event to the list it belongs to, replacing what a resumed run did again."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ArtifactError(f"{where} must be a JSON object with an 'event', got {event!r:.80}.")
    if event["event"] not in ("train", "eval"):
        return
    problems = _check(event, _TRAIN_FIELDS if event["event"] == "train" else _EVENT_FIELDS, {})
    gather(ArtifactError, f"{where} is not a whole event", problems)
    step, epoch = event["step"], float(event["epoch"])
    kept: list[Any] = training if event["event"] == "train" else evaluations
    while kept and kept[-1].step >= step:
        kept.pop()
    if event["event"] == "train":
        loss = _floats({"loss": event["loss"]})["loss"]
        training.append(TrainEvent(step, epoch, loss, int(event.get("skipped") or 0)))
        return
    numbers = {k: v for k, v in event.items() if v is None or _is_number(v)}
    metrics = {k: v for k, v in _floats(numbers).items() if k not in ("step", "epoch")}
    evaluations.append(EvalEvent(step, epoch, metrics))
