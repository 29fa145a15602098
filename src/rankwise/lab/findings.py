"""What the records show, in plain sentences; a difference within the noise is never claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from rankwise.errors import UserError, gather
from rankwise.lab import words
from rankwise.lab.comparing import (
    best_of,
    between,
    comparisons,
    gap_closed,
    smallest_first,
    smallest_not_told_apart,
)
from rankwise.lab.energy import PERCENT, Spectra, rank_holding
from rankwise.lab.noise import LEVEL
from rankwise.lab.records import RunRecord, printable
from rankwise.lab.settings import Comparison, Setting, against, group_runs

__all__ = ["check_comparable", "findings"]


def findings(
    runs: Sequence[RunRecord], spectra: Spectra | None = None, reference: str | None = None
) -> list[str]:
    """What the records show, in plain sentences; a difference within the noise is not claimed.

    Args:
        runs: the records.
        spectra: the singular values of learned updates.
        reference: what the others are compared with (:func:`rankwise.lab.comparing.reference_of`).

    Raises:
        UserError: there are no runs, the runs cannot be compared, or none is the reference.
    """
    check_comparable(runs)
    settings = group_runs(runs)
    usable = [setting for setting in settings if setting.usable]
    made = comparisons(usable, reference)
    sentences = [
        _tell_best(usable, made),
        _tell_comparisons(made),
        _tell_gap(usable, made),
        _tell_ranks(usable),
        *_tell_noise(settings, made),
        _tell_counts(settings),
        _tell_together(runs),
        _tell_spectra(spectra or {}),
        *_tell_left_out(settings),
    ]
    return [sentence for sentence in sentences if sentence]


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


def _tell_together(runs: Sequence[RunRecord]) -> str:
    shared = [run.together for run in runs if run.together > 1]
    if not shared:
        return ""
    return (
        f"{len(shared)} of the {words.count(len(runs), 'run')} went through the base together with "
        f"others, {words.spread(shared)} in one process: their train time is their share, and "
        "their peak memory is not told."
    )


def _tell_best(usable: Sequence[Setting], made: Sequence[Comparison]) -> str:
    best = best_of(usable)
    if best is None:
        return "No run is finished with a finite score, so nothing is compared."
    run, rows = best.first, best.first.evaluation_rows
    scored = f"{run.metric} {words.score(run.metric, best.score)}"
    scored += f" on {rows:,} evaluation rows" if rows else ""
    if best.interval is not None:
        half = words.amount(run.metric, best.interval)
        scored += f" (mean of {len(best.runs)} seeds, ± {half} at 95 %)"
    elif best.standard_error is not None:
        scored += f" (standard error {words.amount(run.metric, best.standard_error)})"
    if not made:
        return f"{best.label}: {scored}. There is no other finished method to compare it with."
    reference = made[0].reference
    if best is reference:
        return f"Best score: {best.label}, {scored}. It is what the others are compared with."
    own = next(c for c in made if c.setting is best)
    return f"Best score: {best.label}, {scored}. {_sentence_of(own, run.metric)}"


def _sentence_of(found: Comparison, metric: str) -> str:
    """One comparison as a sentence about the setting."""
    size, name = words.amount(metric, abs(found.difference)), found.reference.label
    if found.verdict == "not known":
        return (
            f"It scored {size} better than {name}; whether that is more than noise is not known, "
            "as the runs left no answers to the single rows."
        )
    if not found.clear:
        return f"It is not told apart from {name}, which it leads by {size}."
    return f"It is {size} better than {name}, which is more than the noise."


def _tell_comparisons(made: Sequence[Comparison]) -> str:
    known = [c for c in made if c.noise is not None]
    if not known:
        return ""
    metric, reference = known[0].reference.first.metric, known[0].reference.label
    parts: list[str] = []
    for verdict, said in (
        ("better", "better by more than the noise"),
        ("worse", "worse by more than the noise"),
        ("not told apart", "not told apart"),
    ):
        members = [c for c in known if c.verdict == verdict]
        if verdict == "not told apart":
            names = [c.setting.label for c in members]
        else:
            names = [
                f"{c.setting.label} ({words.amount(metric, abs(c.difference))})" for c in members
            ]
        if names:
            parts.append(f"{said}: {words.listed(names)}")
    holm = "" if len(known) == 1 else f" (Holm's correction over {len(known)} comparisons)"
    return f"Beside {reference}{holm}: {'; '.join(parts)}."


def _tell_gap(usable: Sequence[Setting], made: Sequence[Comparison]) -> str:
    head, full = best_of(usable, "head"), best_of(usable, "full")
    if not smallest_first(usable):
        return ""
    if head is None or full is None:
        pairs = (("head-only", head), ("full fine-tuning", full))
        missing = [name for name, setting in pairs if setting is None]
        return (
            f"There is no finished {' and no finished '.join(missing)} run, so it is not known "
            "what share of the gap between the two LoRA covers."
        )
    metric, width, comparison = full.first.metric, full.better_by(head), between(full, head, made)
    size = words.amount(metric, abs(width))
    if not comparison.clear:
        why = "which is within the noise" if comparison.noise else "and the noise is not known"
        return (
            f"Full fine-tuning and head-only training differ by {size}, {why}, so no share of that "
            "gap is given for LoRA."
        )
    if width < 0:
        return (
            f"Full fine-tuning scored {size} worse than head-only training, so there is no gap for "
            "LoRA to close."
        )
    best = max(gap_closed(usable, made), key=lambda gap: gap.share)
    noise = "" if best.noise is None else f" (± {100 * best.noise.half_width():.0f} at 95 %)"
    run = best.setting.first
    return (
        f"Full fine-tuning is {size} better than head-only training. {best.setting.label} "
        f"covers {100 * best.share:.0f} % of that gap{noise}, training {run.counts.trainable:,} "
        f"parameters: {words.percent(run.counts.share)} of the {run.counts.base:,} in the base."
    )


def _tell_ranks(usable: Sequence[Setting]) -> str:
    lora = smallest_first(usable)
    best, enough = best_of(lora), smallest_not_told_apart(lora)
    if best is None or enough is None or len(lora) < 2:
        return ""
    others = against(best, [s for s in lora if s is not best])
    if any(c.noise is None for c in others):
        return f"Of the LoRA runs, {best.label} has the best score."
    if best is lora[0]:
        return f"The best of the LoRA runs, {best.label}, has the smallest update tried."
    if enough is best:
        return f"{best.label} is better than every smaller LoRA update by more than the noise."
    noise = next(c.noise for c in others if c.setting is enough)
    seen = noise.half_width(1 - LEVEL / len(others)) if noise is not None else math.nan
    unseen = words.amount(best.first.metric, seen)
    return (
        f"The smallest LoRA update that the best one ({best.label}) does not beat by more than the "
        f"noise is {enough.label}, with {enough.first.counts.trainable:,} trained parameters "
        f"instead of {best.first.counts.trainable:,}. That does not prove them equal: a "
        f"difference below about {unseen} would not be seen here."
    )


def _tell_noise(settings: Sequence[Setting], made: Sequence[Comparison]) -> list[str]:
    said: list[str] = []
    if any(c.noise is None for c in made):
        said.append(
            "Some runs left no answers to the single evaluation rows, so that no difference "
            "from them is called larger than the noise. Runs of this version leave them."
        )
    elif made:
        said.append(
            "The noise of a difference is what other evaluation rows and other seeds would change, "
            "paired over the rows; docs/math.md (22)."
        )
    single = [setting.label for setting in settings if len(setting.runs) == 1]
    if single:
        what = f"{words.listed(single)} {'comes' if len(single) == 1 else 'come'}"
        if len(single) == len(settings):
            what = "Every result comes"
        said.append(
            f"{what} from one seed: how much the scores would vary from one training to the "
            "next was not measured there, and is not in the noise."
        )
    if not all(run.kept_last for setting in settings for run in setting.runs):
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
