"""The files of a run folder, every part of them checked: the manifest and the log of events."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import ArtifactError, gather

__all__ = [
    "EVENTS",
    "MANIFEST",
    "PLAIN",
    "EvalEvent",
    "TrainEvent",
    "floats",
    "read_events",
    "read_manifest",
]

FORMAT = 1
MANIFEST = "manifest.json"
EVENTS = "metrics.jsonl"
STATUSES = ("finished", "interrupted", "failed", "running")
PEAKS = ("process", "device")
LATER = {"memory": None, "diverged": False, "together": 1}  # which the first runs lack


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


PLAIN = (
    *("name", "method", "config", "seed", "task", "metric", "artifact_bytes", "status", "diverged"),
    "together",
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
    "memory": (_optional(_is_mapping), "an object, or null"),
    "memory.of": (lambda value: value in PEAKS, "one of " + ", ".join(PEAKS)),
    "memory.peak": (_is_count, "a whole number of bytes"),
    "together": (lambda value: _is_count(value) and value != 0, "a whole number of 1 or more"),
    "diverged": (lambda value: isinstance(value, bool), "true or false"),
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


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's values by dotted name, every documented one present and of its kind.

    Raises:
        ArtifactError: the file is missing or damaged; all that is wrong is listed.
    """
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
    problems = _check(LATER | tree, _FIELDS, values)
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


def floats(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """The numbers as floats, with null as NaN."""
    return {k: math.nan if v is None else float(v) for k, v in numbers.items()}


def read_events(path: Path) -> tuple[tuple[TrainEvent, ...], tuple[EvalEvent, ...]]:
    """The training and evaluation events of a metrics.jsonl; other events are passed over.

    Raises:
        ArtifactError: the file is missing, or a line other than the last is damaged.
    """
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
        loss = floats({"loss": event["loss"]})["loss"]
        training.append(TrainEvent(step, epoch, loss, int(event.get("skipped") or 0)))
        return
    numbers = {k: v for k, v in event.items() if v is None or _is_number(v)}
    metrics = {k: v for k, v in floats(numbers).items() if k not in ("step", "epoch")}
    evaluations.append(EvalEvent(step, epoch, metrics))
