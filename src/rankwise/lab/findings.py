"""What the records show, in plain sentences; a difference within the noise is never claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from rankwise.errors import UserError, gather
from rankwise.lab import words
from rankwise.lab.energy import PERCENT, Spectra, rank_holding
from rankwise.lab.records import RunRecord, printable
from rankwise.lab.settings import Comparison, Setting, compare, group_runs

__all__ = [
    "Gap",
    "best_of",
    "check_comparable",
    "findings",
    "gap_closed",
    "lora_by_rank",
    "pairs_of",
    "smallest_not_told_apart",
]


@dataclass(frozen=True)
class Gap:
    """How much of the way from head-only training to full fine-tuning one setting covers.

    Formula: share = (q − q_head) / (q_full − q_head) for scores q; its standard error follows from
    those of the three scores to first order (the delta method), and is None without them.
    """

    setting: Setting
    share: float
    standard_error: float | None


def findings(runs: Sequence[RunRecord], spectra: Spectra | None = None) -> list[str]:
    """What the records show, in plain sentences; a difference within the noise is not claimed.

    Raises:
        UserError: there are no runs, or the runs cannot be compared.
    """
    check_comparable(runs)
    settings = group_runs(runs)
    usable = [setting for setting in settings if setting.usable]
    sentences = [
        _tell_best(usable),
        _tell_gap(usable),
        _tell_ranks(usable),
        *_tell_noise(settings, usable),
        _tell_counts(settings),
        _tell_spectra(spectra or {}),
        *_tell_left_out(settings),
    ]
    return [sentence for sentence in sentences if sentence]


def gap_closed(settings: Sequence[Setting]) -> list[Gap]:
    """The share of the gap that each LoRA setting covers, by rank.

    Empty unless full fine-tuning beats head-only training by twice the standard error or more:
    a share of a gap that is not established means nothing.
    """
    head, full = best_of(settings, "head"), best_of(settings, "full")
    if head is None or full is None or not _establishes(full, head):
        return []
    width = full.better_by(head)
    gaps: list[Gap] = []
    for setting in lora_by_rank(settings):
        share = setting.better_by(head) / width
        errors = [setting.standard_error, full.standard_error, head.standard_error]
        known = [error for error in errors if error is not None]
        weights = (1.0, share, 1.0 - share)
        pairs = zip(weights, known, strict=False)
        error = math.hypot(*(w * e / width for w, e in pairs)) if len(known) == 3 else None
        gaps.append(Gap(setting, share, error))
    return gaps


def check_comparable(runs: Sequence[RunRecord]) -> None:
    """Refuse runs whose scores do not stand beside each other.

    Raises:
        UserError: there are no runs, or they differ in task, metric or evaluation data.
    """
    if not runs:
        raise UserError("A report needs at least one run, and none was given.")
    problems: list[str] = []
    for what, values in (
        ("task", {run.task for run in runs}),
        ("metric", {run.metric for run in runs}),
        ("evaluation data", {(run.data["eval"] or {}).get("fingerprint") for run in runs}),
    ):
        if len(values) > 1:
            names = ", ".join(sorted(str(value) for value in values))
            problems.append(f"they differ in their {what}: {names}.")
    gather(UserError, "These runs cannot be compared; report them apart", problems)


def _tell_best(usable: Sequence[Setting]) -> str:
    best = best_of(usable)
    if best is None:
        return "No run is finished with a finite score, so nothing is compared."
    run, error = best.first, best.standard_error
    rows = f" on {run.evaluation_rows:,} evaluation rows" if run.evaluation_rows else ""
    noise = f" (standard error {words.amount(run.metric, error)})" if error is not None else ""
    scored = f"{run.metric} {words.score(run.metric, best.score)}{rows}{noise}"
    others = [compare(best, other) for other in usable if other is not best]
    if not others:
        return f"{best.label}: {scored}. There is no other finished method to compare it with."
    close = [c.worse if c.better is best else c.better for c in others if not c.clear]
    if all(c.standard_error is None for c in others):
        verdict = (
            "The records give no standard error for this difference, so whether it is truly ahead "
            "is not known."
        )
    elif not close:
        verdict = "It is ahead of every other method by at least twice the standard error."
    else:
        names = words.listed([setting.label for setting in close])
        verdict = (
            f"It is not told apart from {names}: the difference is smaller than twice its standard "
            "error."
        )
    return f"Best score: {best.label}, {scored}. {verdict}"


def _tell_gap(usable: Sequence[Setting]) -> str:
    head, full = best_of(usable, "head"), best_of(usable, "full")
    if not lora_by_rank(usable):
        return ""
    if head is None or full is None:
        pairs = (("head-only", head), ("full fine-tuning", full))
        missing = [name for name, setting in pairs if setting is None]
        return (
            f"There is no finished {' and no finished '.join(missing)} run, so it is not known "
            "what share of the gap between the two LoRA covers."
        )
    metric, width, comparison = full.first.metric, full.better_by(head), compare(full, head)
    size = words.amount(metric, abs(width))
    if not comparison.clear:
        return (
            f"Full fine-tuning and head-only training differ by {size}, which is not established "
            f"({_twice(comparison, metric)}), so no share of that gap is given for LoRA."
        )
    if width < 0:
        return (
            f"Full fine-tuning scored {size} worse than head-only training, so there is no gap for "
            "LoRA to close."
        )
    best = max(gap_closed(usable), key=lambda gap: gap.share)
    error = best.standard_error
    noise = "" if error is None else f" (standard error {100 * error:.0f} points)"
    run = best.setting.first
    return (
        f"Full fine-tuning is {size} better than head-only training. {best.setting.label} "
        f"covers {100 * best.share:.0f} % of that gap{noise}, training {run.counts.trainable:,} "
        f"parameters: {words.percent(run.counts.share)} of the {run.counts.base:,} in the base."
    )


def _tell_ranks(usable: Sequence[Setting]) -> str:
    lora = lora_by_rank(usable)
    best, enough = best_of(lora), smallest_not_told_apart(lora)
    if best is None or enough is None or len({s.first.rank for s in lora}) < 2:
        return ""
    comparison = compare(best, enough)
    if comparison.standard_error is None:
        return f"Of the LoRA runs, {best.label} has the best score."
    if best.first.rank == lora[0].first.rank:
        return f"The best of the LoRA runs, {best.label}, has the smallest rank tried."
    if enough is best:
        return f"No smaller rank tried comes within the noise of {best.label}."
    unseen = words.amount(best.first.metric, 2 * comparison.standard_error)
    return (
        f"The smallest rank tried that is not told apart from the best LoRA run ({best.label}) is "
        f"that of {enough.label}, with {enough.first.counts.trainable:,} trained parameters "
        f"instead of {best.first.counts.trainable:,}. That does not prove them equal: a "
        f"difference below {unseen} would not be seen here."
    )


def _tell_noise(settings: Sequence[Setting], usable: Sequence[Setting]) -> list[str]:
    said: list[str] = []
    pairs = pairs_of(usable)
    known = [pair for pair in pairs if pair.standard_error is not None]
    if known:
        close = sum(not pair.clear for pair in known)
        said.append(
            f"Of {words.count(len(known), 'pair')} of methods, {close} "
            f"{'differs' if close == 1 else 'differ'} by less than twice the standard error of "
            "the difference, and no claim is made about them. The error is the unpaired one, "
            "because the records do not hold the answer to every row."
        )
    single = [setting.label for setting in settings if len(setting.runs) == 1]
    if single:
        what = f"{words.listed(single)} {'comes' if len(single) == 1 else 'come'}"
        if len(single) == len(settings):
            what = "Every result comes"
        said.append(
            f"{what} from one seed: how much the scores would vary from one training to the "
            "next was not measured there, and is not in the standard errors."
        )
    said.append(
        "Each score is that of the best checkpoint, chosen on the same evaluation rows, which "
        "makes every score a little optimistic."
    )
    return said


def _tell_counts(settings: Sequence[Setting]) -> str:
    runs = [run for setting in settings for run in setting.runs]
    promised = [run for run in runs if run.counts.adapter_formula is not None]
    wrong = [run for run in promised if run.counts.adapter_formula != run.counts.adapter]
    if wrong:
        names = words.listed([printable(run.name) for run in wrong])
        return (
            f"The parameters counted in {names} are not those the formula gives. The table shows "
            "both; one of them is wrong."
        )
    if promised:
        return (
            "In every run that has a formula for the size of its adapter, the parameters counted "
            "are exactly those the formula gives."
        )
    return ""


def _tell_spectra(spectra: Spectra) -> str:
    needed = [k for values in spectra.values() if (k := rank_holding(values)) is not None]
    if not needed:
        return ""
    most = max(len(values) for values in spectra.values())
    return (
        f"{PERCENT} of the energy of the learned update lies in {words.spread(needed)} of up "
        f"to {most} directions per layer (median over {words.count(len(needed), 'layer')}: "
        f"{median(needed):g})."
    )


def _tell_left_out(settings: Sequence[Setting]) -> list[str]:
    said: list[str] = []
    skipped = [
        f"{n} in {s.label}"
        for s in settings
        if (n := sum(run.training[-1].skipped for run in s.runs if run.training))
    ]
    if skipped:
        said.append(
            f"Training steps skipped because a gradient was not finite: {words.listed(skipped)}."
        )
    unfinished = [s.label for s in settings if any(r.status != "finished" for r in s.runs)]
    if unfinished:
        said.append(f"Shown but not used in any comparison: {words.listed(unfinished)}.")
    unscored = [
        s.label
        for s in settings
        if math.isnan(s.score) and all(r.status == "finished" for r in s.runs)
    ]
    if unscored:
        said.append(f"Finished without a finite score, and not compared: {words.listed(unscored)}.")
    for what, prints in (
        ("base models", {r.base["fingerprint"] for s in settings for r in s.runs}),
        ("training data", {r.data["train"]["fingerprint"] for s in settings for r in s.runs}),
    ):
        if len(prints) > 1:
            said.append(
                f"The runs do not share their {what} ({len(prints)} fingerprints), so their "
                "differences are not those of the methods alone."
            )
    return said


def pairs_of(settings: Sequence[Setting]) -> list[Comparison]:
    """Every pair of settings, compared."""
    return [compare(one, two) for one, two in combinations(settings, 2)]


def lora_by_rank(settings: Sequence[Setting]) -> list[Setting]:
    """The LoRA settings, from the smallest rank up."""
    return sorted(
        (s for s in settings if s.first.rank is not None), key=lambda s: s.first.rank or 0
    )


def best_of(settings: Sequence[Setting], kind: str | None = None) -> Setting | None:
    """The best scored setting, of one kind if asked; at a tie the one that trains least."""
    best: Setting | None = None
    for setting in settings:
        if kind is not None and setting.first.kind != kind:
            continue
        if best is None or setting.better_by(best) > 0:
            best = setting
    return best


def smallest_not_told_apart(lora: Sequence[Setting]) -> Setting | None:
    """The LoRA setting of smallest rank that the best one does not clearly beat."""
    best = best_of(lora)
    if best is None:
        return None
    return next(s for s in lora if s is best or not compare(best, s).clear)


def _establishes(one: Setting, two: Setting) -> bool:
    """True when ``one`` is better than ``two`` by twice the standard error or more."""
    comparison = compare(one, two)
    return comparison.clear and comparison.better is one


def _twice(comparison: Comparison, metric: str) -> str:
    if comparison.standard_error is None:
        return "the records give no standard error"
    return f"twice the standard error is {words.amount(metric, 2 * comparison.standard_error)}"
