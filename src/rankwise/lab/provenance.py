"""What the runs of a report stand on: base, data, code, hardware and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.lab import words
from rankwise.lab.records import RunRecord
from rankwise.lab.settings import Setting

__all__ = ["facts_of", "own_options", "shared_options"]


def facts_of(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """What the runs stand on; more than one line where the runs differ."""

    def data(part: Mapping[str, Any] | None) -> str:
        if part is None:
            return "none"
        return f"{part['source']}, {part['rows']:,} rows, fingerprint {part['fingerprint']}"

    def pairs(mapping: Mapping[str, Any]) -> str:
        return ", ".join(f"{k} {v}" for k, v in mapping.items() if v is not None) or "not recorded"

    facts: dict[str, list[str]] = {
        "Base model": [f"{r.base['source']}, fingerprint {r.base['fingerprint']}" for r in runs],
        "Training data": [data(run.data["train"]) for run in runs],
        "Evaluation data": [data(run.data["eval"]) for run in runs],
        "Code": [pairs(run.code) for run in runs],
        "Versions": [pairs(run.versions) for run in runs],
        "Hardware": [pairs(run.hardware) for run in runs],
        "Seeds": [", ".join(str(seed) for seed in sorted({run.seed for run in runs}))],
    }
    return [(name, list(dict.fromkeys(values))) for name, values in facts.items()]


def shared_options(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """The options that every run had, with the value they all share."""
    first = runs[0].config
    return [
        (key, words.plain(value))
        for key, value in sorted(first.items())
        if all(key in run.config and run.config[key] == value for run in runs)
    ]


def own_options(settings: Sequence[Setting]) -> list[tuple[str, int, str]]:
    """Method and remaining options of each run, as one line of text each."""
    runs = [(s.label, run) for s in settings for run in s.runs]
    said = {key for key, _ in shared_options([run for _, run in runs])}
    said |= {key for _, run in runs for key in run.method} | {"out", "seed"}
    lines: list[tuple[str, int, str]] = []
    for label, run in runs:
        rest = {k: v for k, v in sorted(run.config.items()) if k not in said}
        parts = [f"{k} = {words.brief(v)}" for k, v in {**run.method, **rest}.items()]
        lines.append((label, run.seed, "; ".join(parts)))
    return lines
