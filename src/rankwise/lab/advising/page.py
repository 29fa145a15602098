"""What an advice says in words, and its page: quality against size, from the record alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rankwise.io import files
from rankwise.lab import words
from rankwise.lab.advising.records import EVERY_LAYER, PER_LAYER, Advice, Trial, Verdict
from rankwise.lab.drawing import MUTED, Figure, Key, Style, line_swatch, name_axes, render
from rankwise.lab.inspecting import LayerEvidence
from rankwise.lab.inspecting.figures import value_map
from rankwise.lab.page import fill
from rankwise.lab.report import Section
from rankwise.lab.styles import unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RECORDS", "REPORT", "reasons", "summary", "write_advice"]

RECORDS, REPORT = "advice.json", "report.html"
_STYLES = {EVERY_LAYER: Style.category(0), PER_LAYER: Style.category(2)}


def summary(advice: Advice) -> list[str]:
    """What was found and advised, in sentences."""
    return [*_grown(advice), *_probe(advice), *_advised(advice)]


def reasons(advice: Advice) -> list[str]:
    """The same as comments of the configuration."""
    return [f"Advised by rankwise advise, in {advice.out}.", *summary(advice)]


def write_advice(advice: Advice, layers: Sequence[LayerEvidence], folder: Path) -> Path:
    """Write the record and its page; returns the page.

    Raises:
        EnvironmentFault: Matplotlib or Jinja2 is not installed, or the disk refuses.
    """
    spectra = value_map(layers)
    drawn = (quality_by_size(advice), *(() if spectra is None else (spectra,)))
    page = fill(
        "evidence.html.jinja",
        kind="Rankwise advice",
        title="How much rank the task needs",
        lead=f"A probe of rank {advice.probe_r}, cut to fewer ranks, on {advice.rows:,} rows held "
        "out of its training.",
        sections=[Section("advice", "What was found", tuple(summary(advice)), drawn)],
        source=RECORDS,
    )
    files.write_json(folder / RECORDS, advice.to_json())
    return files.write_bytes(folder / REPORT, page)


def quality_by_size(advice: Advice) -> Figure:
    """The score of every cut against its parameters, with the probe and what its updates gain."""
    factor, unit = unit_of(advice.metric)
    kinds = {
        kind: sorted((t for t in advice.trials if t.kind == kind), key=lambda t: t.parameters)
        for kind in _STYLES
    }

    def paint(axes: Axes) -> None:
        for score, dash in ((advice.probe_score, ()), (advice.silent_score, (2, 2))):
            axes.axhline(factor * score, color=MUTED, linewidth=1, linestyle=(0, dash or ()))
        for kind, trials in kinds.items():
            style = _STYLES[kind]
            sizes, scores = [t.parameters for t in trials], [factor * t.score for t in trials]
            axes.plot(sizes, scores, **style.line(), linewidth=1.5)
            for t in trials:
                face = style.colour if t.enough else "none"
                axes.plot(
                    [t.parameters],
                    [factor * t.score],
                    marker=style.marker,
                    markeredgecolor=style.colour,
                    markerfacecolor=face,
                    markersize=6,
                )
        axes.set_xscale("log", base=2)
        places = [t.parameters for t in kinds[EVERY_LAYER] if t.size & (t.size - 1) == 0]
        axes.set_xticks(places, [words.round_count(float(f"{p:.2g}")) for p in places])
        axes.minorticks_off()
        name_axes(axes, "parameters of the updates", f"{advice.metric}{unit}")

    return Figure(
        name="quality-by-size",
        title="Quality against size",
        alt="Line chart of the score of each cut of the probe against its parameters, for one rank "
        "in all layers and for ranks chosen layer by layer.",
        caption="Each mark is the probe cut to fewer ranks. A full mark is as good as the probe, "
        "as far as the rows can tell; an open one is not. The line is the probe's score, the "
        "dotted one that of the probe without its updates. The vertical axis need not start at "
        "zero.",
        svg=render("quality-by-size", 280, paint),
        key=(
            *(Key(kind, style.swatch()) for kind, style in _STYLES.items()),
            Key("the probe", line_swatch("var(--muted)")),
            Key("without updates", line_swatch("var(--muted)", "2 2")),
        ),
        columns=(
            *("kind", "size", "parameters", "error", "score", "lost", "low", "high"),
            *("enough", "loss_back"),
        ),
        rows=tuple(
            (
                *(t.kind, t.size, t.parameters, t.error, t.score, t.lost, t.low, t.high),
                *(str(t.enough), t.loss_back),
            )
            for trials in kinds.values()
            for t in trials
        ),
    )


def _grown(advice: Advice) -> Iterator[str]:
    metric = advice.metric
    for step in advice.steps:
        whether = "is no better" if step.enough else "is better"
        larger, own = (words.score(metric, score) for score in (step.larger_score, step.score))
        yield f"Half the ranks of a probe of r = {step.r} are not enough."
        yield (
            f"A probe of r = {step.larger} {whether} ({metric} {larger}, and {own} with "
            f"r = {step.r}): beside it r = {step.r} loses {_loss(advice, step)}."
        )


def _probe(advice: Advice) -> Iterator[str]:
    metric = advice.metric
    yield (
        f"The probe, r = {advice.probe_r} with {advice.probe_parameters:,} parameters, has "
        f"{metric} {words.score(metric, advice.probe_score)} on {advice.rows:,} tuning rows; "
        f"without its updates it has {words.score(metric, advice.silent_score)}."
    )
    if not advice.gained:
        yield (
            "That is no more than the noise: on these rows nothing tells that the updates help at "
            "all, and no rank follows from them. More rows, or another learning rate, may."
        )
    if advice.gap:
        yield (
            f"The singular values of its layers fall most behind k = {words.spread(advice.gap)}, "
            f"{median(advice.gap):g} in the median."
        )


def _advised(advice: Advice) -> Iterator[str]:
    if not advice.gained:
        yield f"No rank is advised; the configuration has the probe's own, r = {advice.probe_r}."
        return
    chosen = advice.chosen
    if chosen is None:
        yield (
            f"No cut is as good as the probe, so r = {advice.probe_r} is needed at least. Try a "
            f"probe of a larger rank: --r {2 * advice.probe_r}."
        )
        return
    if chosen.parameters == advice.probe_parameters:
        yield f"No cut is as good as the probe. Advised: r = {advice.probe_r}, all of it."
        return
    for trial in (advice.same_rank, advice.by_layer):
        if trial is not None and trial.parameters < advice.probe_parameters:
            yield _told(advice, trial)
    below = [t for t in advice.trials if t.kind == EVERY_LAYER and not t.enough]
    if below:
        worst = max(below, key=lambda t: t.size)
        yield f"r = {worst.size} is not enough: it loses {_loss(advice, worst)}."
    share = words.percent(chosen.parameters / advice.probe_parameters)
    yield f"Advised: {chosen.kind}, {chosen.parameters:,} parameters, {share} of the probe's."


def _told(advice: Advice, trial: Trial) -> str:
    size = f"({trial.parameters:,} parameters)"
    if trial.kind == EVERY_LAYER:
        said = f"r = {trial.size} in every layer {size} is enough: it loses"
    else:
        ranks = words.spread(list(trial.ranks.values()))
        said = f"Ranks of {ranks}, chosen layer by layer {size}, are enough: they lose"
    return f"{said} {_loss(advice, trial)}."


def _loss(advice: Advice, found: Verdict) -> str:
    low, high = (words.amount(advice.metric, v, unit=False) for v in (found.low, found.high))
    said = f"{words.amount(advice.metric, found.lost)} ({low} to {high} over other rows)"
    if advice.metric == "loss":
        return said
    back = words.percent(found.loss_back) if found.loss_back > 0 else "nothing"
    return f"{said} and {back} of what the updates take off the loss"
