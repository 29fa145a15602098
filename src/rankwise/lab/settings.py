"""Runs that differ only in their seed as one setting, its score and error, and comparisons."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rankwise.lab import words
from rankwise.lab.records import RunRecord, in_order, printable
from rankwise.train.metrics import better

__all__ = [
    "Comparison",
    "Setting",
    "compare",
    "differences",
    "group_runs",
    "higher_is_better",
    "pareto",
]

NOT_A_SETTING = frozenset({"out", "seed"})
"""Options that do not change what is tried: runs that differ only in these are repetitions."""
UNSAID = NOT_A_SETTING | {"adapted", "method", "trained"}
"""What follows from the options, or from the name, and tells no two settings apart by itself."""


def higher_is_better(metric: str) -> bool:
    """True for metrics such as accuracy, False for those such as the loss."""
    return better(metric, 1.0, 0.0)


@dataclass(frozen=True)
class Setting:
    """One thing tried: the runs that differ in nothing but their seed, ordered by seed."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        """The run with the lowest seed; it speaks for what the runs share."""
        return self.runs[0]

    @property
    def usable(self) -> bool:
        """True when every run of the setting is usable."""
        return all(run.usable for run in self.runs)

    @property
    def score(self) -> float:
        """Mean score over the seeds; NaN when any run has none."""
        return fmean(run.score for run in self.runs)

    @property
    def seconds(self) -> float:
        """Mean wall time of training over the seeds, in seconds."""
        return fmean(run.seconds["train"] for run in self.runs)

    @property
    def standard_error(self) -> float | None:
        """Standard error of ``score``; None when it cannot be computed from the records.

        Formula: SE² = p (1 − p) / n + s² / k for an accuracy p on n evaluation rows and k seeds,
        where s is the standard deviation over the seeds (no second term for one seed). The seeds
        share their evaluation rows, so the first term does not shrink with k. Other metrics have
        no such formula; for them the spread over two or more seeds alone is given.
        """
        scores = [run.score for run in self.runs]
        if not all(math.isfinite(score) for score in scores):
            return None
        between = stdev(scores) ** 2 / len(scores) if len(scores) > 1 else None
        rows = self.first.evaluation_rows
        if self.first.metric == "accuracy" and rows:
            p = min(max(fmean(scores), 0.0), 1.0)
            return math.sqrt(p * (1 - p) / rows + (between or 0.0))
        return None if between is None else math.sqrt(between)

    def better_by(self, other: Setting) -> float:
        """How much better this setting scored than ``other``, in the metric's unit."""
        sign = 1.0 if higher_is_better(self.first.metric) else -1.0
        return sign * (self.score - other.score)


@dataclass(frozen=True)
class Comparison:
    """Two settings side by side; ``better`` scored at least as well as ``worse``."""

    better: Setting
    worse: Setting
    difference: float
    standard_error: float | None

    @property
    def clear(self) -> bool:
        """True when the difference is at least twice its standard error, and that is known."""
        return self.standard_error is not None and (
            self.difference > 0 and self.difference >= 2 * self.standard_error
        )


def compare(one: Setting, two: Setting) -> Comparison:
    """Compare two settings by their scores.

    The standard error of the difference is the unpaired one, √(SE₁² + SE₂²): the records do not
    hold the answer to every row, so the pairing of rows cannot be used. Where both runs tend to
    fail on the same rows this is too large rather than too small, and the verdict is cautious.
    """
    difference = one.better_by(two)
    ahead, behind = (two, one) if difference < 0 else (one, two)
    errors = (one.standard_error, two.standard_error)
    error = None if errors[0] is None or errors[1] is None else math.hypot(errors[0], errors[1])
    return Comparison(ahead, behind, abs(difference), error)


def group_runs(runs: Sequence[RunRecord]) -> list[Setting]:
    """Gather runs that differ only in their seed, ordered from the fewest trained parameters up.

    A label tells what is not finished, "name (interrupted)". Settings that bear the same name are
    told apart by the options that differ, "name (lr = 0.001)", and if need be by a number. A seed
    that comes twice is no repetition, so its second run makes a setting of its own.
    """
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    for run in in_order(runs):
        key, turn = _setting_key(run), 0
        while any(run.seed == other.seed for other in groups.get((key, turn), ())):
            turn += 1
        groups.setdefault((key, turn), []).append(run)
    members = [tuple(sorted(group, key=lambda run: run.seed)) for group in groups.values()]
    return [Setting(label, group) for label, group in zip(_labels(members), members, strict=True)]


def _labels(groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    """One label per group of runs, no two the same."""
    names = [_label(group) for group in groups]
    labels: list[str] = []
    for name, group in zip(names, groups, strict=True):
        alike = [other[0] for n, other in zip(names, groups, strict=True) if n == name]
        apart = dict(zip(map(id, alike), differences(alike), strict=True))[id(group[0])]
        label = f"{name} ({apart})" if apart else name
        again = sum(known == label or known.startswith(f"{label} #") for known in labels)
        labels.append(f"{label} #{again + 1}" if again else label)
    return labels


def differences(runs: Sequence[RunRecord], but: Sequence[str] = ()) -> list[str]:
    """What sets each run apart from the others: the options that differ, bar some, in words."""
    options = [{**run.config, **run.method} for run in runs]
    keys = sorted({key for mapping in options for key in mapping} - UNSAID - {*but})
    apart = [k for k in keys if len({words.plain(mapping.get(k)) for mapping in options}) > 1]
    return [", ".join(_option(k, mapping.get(k)) for k in apart) for mapping in options]


def pareto(settings: Sequence[Setting]) -> list[Setting]:
    """The settings that no other one beats at equal or smaller size, smallest first."""
    kept: list[Setting] = []
    for setting in sorted(settings, key=lambda s: s.first.counts.trainable):
        if kept and setting.better_by(kept[-1]) <= 0:
            continue
        if kept and setting.first.counts.trainable == kept[-1].first.counts.trainable:
            kept.pop()
        kept.append(setting)
    return kept


def _setting_key(run: RunRecord) -> str:
    config = {k: v for k, v in run.config.items() if k not in NOT_A_SETTING}
    parts = [run.method, config, run.base["fingerprint"], run.data["train"]["fingerprint"]]
    return json.dumps(parts, sort_keys=True, default=str)


def _label(runs: Sequence[RunRecord]) -> str:
    """The name the runs share: the first run's, without a seed at its end where there are more."""
    name = printable(runs[0].name)
    if len(runs) > 1:
        seed = r"[\s,;:(\[_-]*seed[\s=:_-]*\d+[)\]\s]*$"
        name = re.sub(seed, "", name, flags=re.IGNORECASE) or name
    unfinished = sorted({run.status for run in runs} - {"finished"})
    return f"{name} ({', '.join(unfinished)})" if unfinished else name


def _option(key: str, value: object) -> str:
    """An option in a few words; a list of names speaks for itself."""
    if value is None:
        return printable(f"{key} not set")[:60]
    if isinstance(value, list):
        return printable(", ".join(map(str, value)))[:60]
    return printable(f"{key} = {words.plain(value)}")[:60]
