"""How the learning rates were chosen: what a report tells of the searches, and their figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankwise.lab import words
from rankwise.lab.compare.folder import Pinned
from rankwise.lab.compare.tuning import KEPT, Settled
from rankwise.lab.curves import MOST, Part
from rankwise.lab.drawing import Cell, Figure, name_axes, render
from rankwise.lab.families import families
from rankwise.lab.records import RunRecord
from rankwise.lab.report import Section
from rankwise.lab.settings import Setting
from rankwise.lab.styles import NOT_FROM_ZERO, Styles, keys, styles_of, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Found", "searching"]

TITLE = "How the learning rates were chosen"
MANY = 5  # learning rates that have a place on an axis; of more the powers of ten do


@dataclass(frozen=True)
class Found:
    """One search: every rate that was tried with its run, the smallest first, and its end."""

    key: str
    tried: tuple[tuple[float, RunRecord], ...]
    settled: Settled

    @property
    def label(self) -> str:
        """The name of what was searched."""
        return self.tried[0][1].name


def searching(searches: Sequence[Found], pinned: Pinned, head_rate: float | None) -> Section:
    """The part of a report about the learning rates, the output layer's own among them."""
    if not searches:
        none = (
            "There was no search (--rates 1): every method ran at the default learning rate of "
            "rankwise fit, which need not be the best one of any."
        )
        return Section("rates", TITLE, (none,))
    settings = [Setting(found.label, (found.tried[0][1],)) for found in searches]
    by_label = {found.label: found for found in searches}
    styles = styles_of(settings)
    drawn = [
        _figure(part, [by_label[s.label] for s in part.settings], styles, pinned.metric)
        for part in _parts(settings)
    ]
    head = [_of_the_head(head_rate)] if pinned.grid.head_first else []
    sentences = (*_how(searches, pinned), *head, *_what_came(searches))
    return Section("rates", TITLE, sentences, tuple(drawn))


def _how(searches: Sequence[Found], pinned: Pinned) -> list[str]:
    """How the searches went about it."""
    config, parts = pinned.config, pinned.parts
    tuning, fitting = parts["search-eval"].rows, parts["search-train"].rows
    others = f"{fitting:,} of the others" if config.search_rows else f"the other {fitting:,}"
    epochs = searches[0].tried[0][1].config["epochs"]
    schedule = (
        "under the same schedule"
        if config.search_epochs is None
        else f"under a schedule of its own length ({epochs:g} epochs)"
    )
    cut = (
        f"Every method had the same search. Of the training rows {tuning:,} were set aside for it; "
        f"each rate was tried once, trained on {others} {schedule}, and "
        f"judged by {pinned.metric} on those {tuning:,} after the last step. The evaluation rows "
        "took no part, neither in the search nor in choosing a checkpoint."
    )
    steps = (
        f"Rates are 1 and 3 times powers of ten: {config.rates} around the default of rankwise "
        "fit, and while the best is at the edge one further, "
        f"{words.count(config.widen, 'time')} at most."
    )
    said = [cut, steps]
    if any(run.rank is not None for found in searches for _, run in found.tried):
        said.append(
            "LoRA had a search at every rank."
            if config.search_rank is None
            else f"LoRA was searched at r = {config.search_rank} alone, and every rank uses that "
            "rate, which may suit some of them less: part of what the curves over the rank show."
        )
    return said


def _of_the_head(rate: float | None) -> str:
    """What rate the output layer has in the runs beside head-only's."""
    if rate is None:
        return "Head-only training found no rate, so every output layer learned at its method's."
    return (
        "Head-only training was searched first, and the output layer of every other method learned "
        f"at {rate:g} (--head-lr), the lowest rate that kept {100 * KEPT:g} % of what the best one "
        "of that search gained over the worst below it. The rates of the other methods are those "
        "of what they train beside it."
    )


def _what_came(searches: Sequence[Found]) -> list[str]:
    """What the searches ended with."""
    said: list[str] = []
    edge = [f for f in searches if f.settled.at_edge and f.settled.rate is not None]
    if edge:
        names = words.listed([f"{f.label} ({f.settled.rate:g})" for f in edge])
        said.append(
            f"The best rate is still at the edge of its search for {names}: a better one may lie "
            "beyond it, and the score is a bound on the method rather than its best."
        )
    else:
        said.append("Every search ended with its best rate inside, not at its edge.")
    lost = [(f.label, rate) for f in searches for rate, run in f.tried if math.isnan(run.score)]
    if lost:
        names = words.listed([f"{label} at {rate:g}" for label, rate in lost])
        said.append(f"These ended without a score, as with a loss that was no number: {names}.")
    none = [f.label for f in searches if f.settled.rate is None]
    if none:
        said.append(f"No rate trained, so there are no runs of it: {words.listed(none)}.")
    return said


def _parts(settings: Sequence[Setting]) -> list[Part]:
    """The searches in parts that can be read: the methods, and LoRA by its rule for α."""
    if len(settings) <= MOST:
        return [Part("", "", tuple(settings))]
    others = tuple(s for s in settings if s.first.rank is None)
    parts = [Part("-methods", ", method by method", others)] if others else []
    for number, family in enumerate(families(settings)):
        parts.append(Part(f"-ranks-{number + 1}", f", {family.label}", family.members))
    return parts


def _figure(part: Part, group: Sequence[Found], styles: Styles, metric: str) -> Figure:
    """Score on the tuning rows against the learning rate, one line for each search."""
    factor, unit = unit_of(metric)

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        for found in group:
            style = styles[found.label]
            points = [(rate, factor * run.score) for rate, run in found.tried]
            axes.plot(
                [rate for rate, _ in points],
                [score for _, score in points],
                **style.line(),
                marker=style.marker,
                markersize=3.5,
                linewidth=1.3,
            )
            best = [(rate, score) for rate, score in points if rate == found.settled.rate]
            axes.plot(
                [rate for rate, _ in best],
                [score for _, score in best],
                color=style.colour,
                marker=style.marker,
                markersize=9,
                linestyle="",
            )
        ticks = sorted({rate for found in group for rate, _ in found.tried})
        axes.set_xticks([t for t in ticks if len(ticks) <= MANY or f"{t:e}".startswith("1.")])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        name_axes(axes, "learning rate (logarithmic)", f"{metric}{unit} on the tuning rows")

    rows: list[tuple[Cell, ...]] = [
        (
            *(found.label, rate, run.metrics.get(metric), run.metrics.get("loss")),
            "yes" if rate == found.settled.rate else "no",
        )
        for found in group
        for rate, run in found.tried
    ]
    chosen = "; ".join(f"{found.label} {found.settled.rate}" for found in group)
    return Figure(
        name=f"rates{part.name}",
        title=f"{metric.capitalize()} on the tuning rows{part.title}",
        alt=f"Line chart of {metric} on the tuning rows against the learning rate. Chosen: "
        f"{chosen}.",
        caption=f"One run for each point; the large mark is the rate that was chosen, of equal "
        f"scores that of the lower loss. {NOT_FROM_ZERO}",
        svg=render(f"rates{part.name}", 260, paint),
        key=keys(part.settings, styles),
        columns=("method", "learning rate", metric, "loss", "chosen"),
        rows=tuple(rows),
    )
