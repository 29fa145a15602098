"""Runs that differ only in their seed as one setting, its score and error, and comparisons."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Literal

import numpy as np

from rankwise.lab import words
from rankwise.lab.noise import LEVEL, Noise, Term, combine, holm, interval_of_seeds
from rankwise.lab.records import RunRecord, in_order, printable
from rankwise.train.metrics import better

__all__ = [
    "Comparison",
    "Setting",
    "against",
    "compare",
    "corrected",
    "differences",
    "group_runs",
    "higher_is_better",
    "noise_of",
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
    def peak_bytes(self) -> float | None:
        """Mean over the seeds of the most memory held; None when any run does not say."""
        peaks = [run.peak_bytes for run in self.runs if run.peak_bytes is not None]
        return fmean(peaks) if len(peaks) == len(self.runs) else None

    @property
    def interval(self) -> float | None:
        """Half the 95 % interval of ``score`` over the seeds; None for one seed."""
        scores = [run.score for run in self.runs]
        return interval_of_seeds(scores) if all(map(math.isfinite, scores)) else None

    @property
    def standard_error(self) -> float | None:
        """Standard error of ``score`` over rows and seeds; None when the records do not tell it.

        That of :func:`noise_of` this score alone. Runs that left no answers to their rows have
        SE² = p (1 − p) / n + s² / K for an accuracy p on n rows with a standard deviation s over K
        seeds (no second term for one seed), and for other metrics the second term alone.
        """
        scores = [run.score for run in self.runs]
        if not all(math.isfinite(score) for score in scores):
            return None
        noise = noise_of([(1.0, self)])
        if noise is not None:
            return noise.standard_error
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
    """A setting beside a reference.

    Attributes:
        setting, reference: what is compared.
        difference: how much better the setting scored, in the metric's unit; below 0 where worse.
        noise: of the difference; None where the records do not tell it.
        p: the probability of such a difference by noise alone; None without ``noise``.
        corrected: ``p`` after Holm's correction over the comparisons it was made with.
    """

    setting: Setting
    reference: Setting
    difference: float
    noise: Noise | None
    p: float | None
    corrected: float | None

    @property
    def clear(self) -> bool:
        """True when the difference is larger than the noise; never where that is not known."""
        return self.corrected is not None and self.corrected <= LEVEL

    @property
    def verdict(self) -> Literal["better", "worse", "not told apart", "not known"]:
        """What may be said of the setting beside its reference."""
        if self.corrected is None:
            return "not known"
        if not self.clear:
            return "not told apart"
        return "better" if self.difference > 0 else "worse"


def against(reference: Setting, others: Sequence[Setting]) -> list[Comparison]:
    """Each setting beside the reference, by the one rule of this house.

    A difference is larger than the noise when its two-sided p of Student's t, paired over the
    evaluation rows and with the seeds as repetitions (:func:`noise_of`), is at most 0.05 after
    Holm's correction over all these comparisons. docs/math.md (22).
    """
    found: list[Comparison] = []
    for other in others:
        difference = other.better_by(reference)
        noise = noise_of([(1.0, other), (-1.0, reference)])
        p = None if noise is None or math.isnan(difference) else noise.p(difference)
        found.append(Comparison(other, reference, difference, noise, p, None))
    return corrected(found)


def corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with Holm's correction over all of them, of one reference or several."""
    chances = iter(holm([c.p for c in found if c.p is not None]))
    return [c if c.p is None else replace(c, corrected=next(chances)) for c in found]


def compare(one: Setting, two: Setting) -> Comparison:
    """``one`` beside ``two`` when no other comparison is made: :func:`against` for one alone."""
    return against(two, [one])[0]


def noise_of(sum_of: Sequence[tuple[float, Setting]]) -> Noise | None:
    """The noise of a weighted sum of scores over rows and seeds (:func:`rankwise.lab.noise`).

    None where a run left no answers, or where the settings did not answer the same rows.
    """
    answers = [run.answers for _, setting in sum_of for run in setting.runs]
    rows = [each.rows for each in answers if each is not None]
    if len(rows) < len(answers) or not all(np.array_equal(each, rows[0]) for each in rows):
        return None
    terms: list[Term] = []
    for weight, setting in sum_of:
        parts = [run.contributions for run in setting.runs]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        scores = np.array([run.score for run in setting.runs])
        terms.append(Term(weight, np.stack(known, axis=1), scores))
    return combine(terms)


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
