"""What the theory's records show, in plain sentences that say so where something does not hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, stdev

from rankwise.lab import words
from rankwise.lab.theory.records import Bound, Cell, Samples, TheoryRecord

__all__ = [
    "NEAR",
    "TOLERANCE",
    "TRAINS",
    "ZERO",
    "about_bounds",
    "about_inputs",
    "about_samples",
    "about_scaling",
    "best_rank",
    "by_section",
    "falls",
    "outcome",
    "rates_told",
    "reaches",
    "told",
    "training_rates",
]

NEAR = 0.01
"""A learned error is at its bound when it is above it by no more than this share of it."""
ZERO = 1e-20
"""A bound below this share of ‖Δ*‖² is the rounding of zero."""
TOLERANCE = 1e-6
"""Where the bound is zero, the share of ‖Δ*‖² that may be left."""
TRAINS = 0.1
"""A learning rate trains when no more than this share of the error is left."""


def reaches(error: float, bound: float) -> bool:
    """Whether a learned error is at its bound."""
    return error <= TOLERANCE if bound <= ZERO else error <= (1 + NEAR) * bound


def falls(rows: Sequence[Bound]) -> bool:
    """Whether the error of one spectrum falls with every rank until nothing is left."""
    ordered = sorted(rows, key=lambda row: row.r)
    return all(b.error < a.error or a.error <= TOLERANCE for a, b in pairwise(ordered))


def by_section(record: TheoryRecord) -> dict[str, list[str]]:
    """Every sentence, by the part of the page it belongs to."""
    return {
        "bounds": about_bounds(record),
        "inputs": about_inputs(record),
        "samples": about_samples(record),
        "scaling": about_scaling(record),
    }


def about_bounds(record: TheoryRecord) -> list[str]:
    """Whether every rank reaches its bound under white inputs, and the error falls."""
    rows = record.bounds
    met = sum(reaches(row.error, row.bound) for row in rows)
    above = [row for row in rows if row.bound > ZERO]
    zero = [row for row in rows if row.bound <= ZERO]
    verdict = (
        f"{_share(met, len(rows))} pairs of a spectrum and a rank, the learned error is at its "
        f"bound: no more than {words.percent(NEAR)} above it, or below {told(TOLERANCE)} of ‖Δ*‖² "
        "where the bound is 0."
    )
    sentences = [verdict]
    if above:
        far = max(above, key=lambda row: row.error / row.bound)
        sentences.append(
            f"The farthest above its bound is the {far.spectrum} spectrum at r = {far.r}, by "
            f"{told(far.error / far.bound - 1)} of it."
        )
    if zero:
        most = max(row.error for row in zero)
        sentences.append(f"Where the bound is 0, at most {told(most)} of ‖Δ*‖² is left.")
    names = list(dict.fromkeys(row.spectrum for row in rows))
    rising = [n for n in names if not falls([row for row in rows if row.spectrum == n])]
    sentences.append(
        f"The error does not fall with every rank for: {words.listed(rising)}."
        if rising
        else "With every rank the error falls, until nothing is left, for every spectrum."
    )
    return sentences


def about_inputs(record: TheoryRecord) -> list[str]:
    """Which of the two bounds the learned update follows."""
    rows = record.inputs
    met = sum(reaches(row.loss, row.loss_bound) for row in rows)
    shown = [row for row in rows if row.loss_bound > ZERO]
    verdict = (
        f"{_share(met, len(rows))} ranks, the learned loss is at the bound of reduced-rank "
        f"regression: no more than {words.percent(NEAR)} above it, or below {told(TOLERANCE)} "
        "where it is 0."
    )
    sentences = [verdict]
    if shown:
        svd = max(shown, key=lambda row: row.loss_of_svd / row.loss_bound)
        times = svd.loss_of_svd / svd.loss_bound
        sentences.append(
            f"The truncated SVD of Δ* has up to {times:.2g} times that loss (at r = {svd.r})."
        )
        far = max(shown, key=lambda row: row.error / row.error_bound)
        times = far.error / far.error_bound
        sentences.append(
            f"In the weights, the learned update has up to {times:.2g} times the squared error of "
            f"the truncated SVD (at r = {far.r})."
        )
    return sentences


def about_samples(record: TheoryRecord) -> list[str]:
    """Which rank errs least from so many samples, and what the error at full rank is made of."""
    sentences: list[str] = []
    for count in sorted({row.rows for row in record.samples}):
        mine = sorted((row for row in record.samples if row.rows == count), key=lambda row: row.r)
        best, full = best_rank(mine), mine[-1]
        sentences.append(
            f"From {count:,} samples the error is least at r = {best.r}: "
            f"{words.percent(best.error)} of ‖Δ*‖², of which {words.percent(best.of_rank)} come "
            f"from the rank and {words.percent(best.of_estimation)} from estimation. At full rank "
            f"(r = {full.r}) it is {words.percent(full.error)}, {_more(full, best)}."
        )
    most = max((abs(row.of_training) for row in record.samples), default=0.0)
    sentences.append(
        "Training ended where the closed form of reduced-rank regression on the same samples is: "
        f"the errors differ by at most {told(most)} of ‖Δ*‖²."
    )
    return sentences


def about_scaling(record: TheoryRecord) -> list[str]:
    """For each optimiser and scaling, the learning rates that train at every rank."""
    sentences: list[str] = []
    for optimizer, rule in dict.fromkeys((c.optimizer, c.rule) for c in record.scaling):
        cells = [c for c in record.scaling if (c.optimizer, c.rule) == (optimizer, rule)]
        ranks = sorted({cell.r for cell in cells})
        each = [training_rates(cells, r) for r in ranks]
        common = sorted(set(each[0]).intersection(*each[1:]))
        low, high = ranks[0], ranks[-1]
        if common:
            verdict = f"{rates_told(common)} {_train(common)} at every rank from {low} to {high}"
        else:
            verdict = f"no learning rate that was tried trains at every rank from {low} to {high}"
        ends = (
            f"{rates_told(rates)} {_train(rates)} at r = {r}"
            for r, rates in ((low, each[0]), (high, each[-1]))
        )
        sentences.append(
            f"{optimizer[0].upper()}{optimizer[1:]}, {rule}: {verdict}; {'; '.join(ends)}."
        )
    return sentences


def best_rank(rows: Sequence[Samples]) -> Samples:
    """The row with the least error."""
    return min(rows, key=lambda row: row.error)


def training_rates(cells: Sequence[Cell], r: int) -> list[float]:
    """The learning rates that train at a rank, rising."""
    return sorted(cell.rate for cell in cells if cell.r == r and outcome(cell) == "trains")


def outcome(cell: Cell) -> str:
    """Whether a learning rate trains, stalls or diverges."""
    if cell.left is None:
        return "diverges"
    return "trains" if cell.left <= TRAINS else "stalls"


def rates_told(rates: Sequence[float]) -> str:
    """Learning rates, each twice the one before, by the ends of their runs: "0.00781 to 0.25"."""
    if not rates:
        return "no rate"
    runs: list[list[float]] = []
    for rate in rates:
        if runs and rate < 2.5 * runs[-1][-1]:
            runs[-1].append(rate)
        else:
            runs.append([rate])
    ends = [(f"{run[0]:.3g}", f"{run[-1]:.3g}") for run in runs]
    return words.listed([low if low == high else f"{low} to {high}" for low, high in ends])


def told(value: float) -> str:
    """A number as a reader takes it in, small and large ones by their power of ten: 4·10⁻⁹."""
    if value == 0 or not math.isfinite(value) or 0.0009995 <= abs(value) < 10_000:
        return f"{value:.2g}"
    digits, power = f"{value:.0e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if digits == "1" else f"{digits}·10{raised}"


def _more(full: Samples, best: Samples) -> str:
    """How much more the error at full rank is, draw by draw, and whether that stands out."""
    gaps = [a - b for a, b in zip(full.learned, best.learned, strict=True)]
    more, error = fmean(gaps), stdev(gaps) / math.sqrt(len(gaps))
    said = f"{100 * more:.3g} points more (standard error {100 * error:.3g} points)"
    return said if more >= 2 * error else f"{said}: not told apart"


def _train(rates: Sequence[float]) -> str:
    return "train" if len(rates) > 1 else "trains"


def _share(met: int, of: int) -> str:
    return f"At all of the {of}" if met == of else f"At {met} of the {of}"
