"""The report of a comparison: one self-contained HTML page, a pure function of run records."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import UserError
from rankwise.io import files
from rankwise.lab import figures, words
from rankwise.lab.certificates import certificate_view
from rankwise.lab.comparing import (
    best_of,
    comparisons,
    gap_closed,
    smallest_first,
    smallest_not_told_apart,
)
from rankwise.lab.costs import peak_memory, wall_time
from rankwise.lab.curves import evaluation_curves, parts_of, training_curves
from rankwise.lab.drawing import Cell, Figure, csv_text
from rankwise.lab.energy import Spectra, update_spectrum
from rankwise.lab.findings import check_comparable, findings
from rankwise.lab.page import fill
from rankwise.lab.provenance import facts_of, own_options, shared_options
from rankwise.lab.records import RunRecord
from rankwise.lab.settings import Comparison, Setting, group_runs, noise_of

__all__ = ["Section", "summary_table", "write_report"]


@dataclass(frozen=True)
class Section:
    """A further part of a report: sentences and figures under a title; ``name`` is its anchor."""

    name: str
    title: str
    sentences: tuple[str, ...]
    figures: tuple[Figure, ...] = ()


def write_report(
    path: str | Path,
    *,
    title: str,
    runs: Sequence[RunRecord],
    reference: str | None = None,
    certificate: Mapping[str, Any] | None = None,
    spectra: Spectra | None = None,
    sections: Sequence[Section] = (),
    notes: Sequence[str] = (),
    numbers: str | Path | None = None,
) -> Path:
    """Write one HTML page that shows what ``runs`` found, and return its path.

    The page needs no network and no scripts. The same arguments give the same bytes. The file
    appears whole or not at all, and its folder is made where there is none.

    Args:
        path: the page.
        title: its heading.
        runs: the records.
        reference: what the others are compared with, by its label or its kind; full fine-tuning,
            head-only training or what trains most when not named.
        certificate: the merge certificate: passed, dtype, layers (name, error, bound, effect),
            outputs (error, effect, tolerance; or None without a probe), finite, sha256 (base,
            adapter, merged; each may be None), probe, and where there are any, problems.
        spectra: the singular values of each layer's update, by the layer's name.
        sections: further parts, put after the figures.
        notes: sentences for the end of the page.
        numbers: a folder for the numbers of each figure and table as CSV; None for no folder.

    Raises:
        UserError: there are no runs, the runs cannot be compared, none is the reference, or the
            path is a folder or below a file.
        ArtifactError: the certificate lacks a part, or holds one of the wrong kind.
        EnvironmentFault: Matplotlib, Jinja2 or SciPy is missing, or a file cannot be written.
    """
    check_comparable(runs)
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give the name of the HTML file to write.")
    settings = group_runs(runs)
    usable = [setting for setting in settings if setting.usable]
    made = comparisons(usable, reference)
    drawn, missing = _figures(settings, made, spectra or {})
    merge = None if certificate is None else certificate_view(certificate)
    ordered = [run for setting in settings for run in setting.runs]
    columns, rows = _table(settings)
    metric = ordered[0].metric
    page = fill(
        "report.html.jinja",
        title=title,
        runs=ordered,
        source=_short_source(ordered[0].base["source"]),
        metric=metric,
        tiles=_tiles(usable, merge),
        sentences=findings(ordered, spectra, reference),
        columns=columns,
        rows=rows,
        several=any(len(setting.runs) > 1 for setting in settings),
        gaps=gap_closed(usable, made),
        comparisons=made,
        amount=lambda value: words.amount(metric, value),
        percent=words.percent,
        chance=words.chance,
        small=_small,
        figures=drawn,
        missing=missing,
        sections=sections,
        merge=merge,
        facts=facts_of(ordered),
        shared=shared_options(ordered),
        own=own_options(settings),
        notes=[*notes, *dict.fromkeys(note for run in ordered for note in run.notes)],
    )
    files.write_bytes(path, page)
    if numbers is not None:
        every = [*drawn, *(figure for section in sections for figure in section.figures)]
        _write_numbers(Path(numbers), settings, every)
    return path


def summary_table(runs: Sequence[RunRecord]) -> str:
    """The table of the report as aligned plain text, one line per method.

    Raises:
        UserError: there are no runs, or the runs cannot be compared.
    """
    check_comparable(runs)
    columns, rows = _table(group_runs(runs))
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def text(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([text(columns), "  ".join("-" * w for w in widths), *map(text, rows)])


def _figures(
    settings: Sequence[Setting], made: Sequence[Comparison], spectra: Spectra
) -> tuple[list[Figure], list[str]]:
    """The figures the records allow, and why the others are missing."""
    parts = parts_of(settings)

    def curves(draw: Callable[..., Figure | None]) -> Callable[[], list[Figure | None]]:
        return lambda: [draw(settings, part) for part in parts]

    def one(draw: Callable[..., Figure | None], *given: Any) -> Callable[[], list[Figure | None]]:
        return lambda: [draw(*given)]

    builders: tuple[tuple[Callable[[], list[Figure | None]], str], ...] = (
        (one(figures.quality_by_rank, settings), "against the rank: no LoRA run has a score"),
        (one(figures.quality_by_size, settings), "against trained parameters: no run is scored"),
        (
            one(figures.beside_reference, settings, made),
            "of differences: the records tell the noise of none",
        ),
        (curves(training_curves), "of training loss: none was logged"),
        (curves(evaluation_curves), "of evaluations: none was logged"),
        (one(update_spectrum, spectra), "of singular values: no learned update given"),
        (one(wall_time, settings), "of wall time: none was recorded"),
        (one(peak_memory, settings), "of peak memory: none was recorded"),
    )
    drawn: list[Figure] = []
    missing: list[str] = []
    for build, reason in builders:
        found = [figure for figure in build() if figure is not None]
        drawn += found
        missing += [] if found else [reason]
    return drawn, missing


def _table(settings: Sequence[Setting]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of the summary, as text, for the page and the terminal alike."""
    metric = settings[0].first.metric
    several = any(len(setting.runs) > 1 for setting in settings)
    columns = ["method", "r", "α", metric, *(["± 95 %"] if several else []), "± SE", "formula"]
    columns += ["counted", "trained", "% of base", "train time", "peak memory", "file size"]
    columns += ["seeds"] if several else []
    rows: list[list[str]] = []
    for setting in settings:
        run, counts = setting.first, setting.first.counts
        interval, peak = setting.interval, setting.peak_bytes

        def amount(value: float | None) -> str:
            return "–" if value is None else words.amount(metric, value, unit=False)

        rows.append(
            [
                setting.label,
                "–" if run.rank is None else str(run.rank),
                "–" if run.alpha is None else f"{run.alpha:g}",
                words.score(metric, setting.score),
                *([amount(interval)] if several else []),
                amount(setting.standard_error),
                "–" if counts.adapter_formula is None else f"{counts.adapter_formula:,}",
                f"{counts.adapter:,}",
                f"{counts.trainable:,}",
                words.percent(counts.share),
                words.duration(setting.seconds),
                "–" if peak is None else words.size(round(peak)),
                "–" if run.artifact_bytes is None else words.size(run.artifact_bytes),
                *([str(len(setting.runs))] if several else []),
            ]
        )
    return columns, rows


def _write_numbers(folder: Path, settings: Sequence[Setting], drawn: Sequence[Figure]) -> None:
    """The numbers of the figures, of the methods and of every run, as CSV files."""
    for figure in drawn:
        files.write_text(folder / f"{figure.name}.csv", figure.csv())
    metric = settings[0].first.metric
    about = ("base", "adapter", "head", "trainable")
    methods: list[list[Cell]] = [
        [
            *(s.label, s.first.rank, s.first.alpha, len(s.runs), s.score, s.interval),
            *(s.standard_error, *(getattr(s.first.counts, name) for name in about)),
            *(s.seconds, s.peak_bytes, s.first.artifact_bytes),
        ]
        for s in settings
    ]
    columns = ["method", "r", "α", "seeds", metric, "half of the 95 % interval over seeds"]
    columns += ["standard error", *(f"parameters: {name}" for name in about)]
    columns += ["train time (s)", "peak memory (bytes)", "file size (bytes)"]
    files.write_text(folder / "methods.csv", csv_text(columns, methods))
    names = list(dict.fromkeys(n for s in settings for run in s.runs for n in run.metrics))
    single: list[list[Cell]] = [
        [
            *(s.label, run.seed, run.status, run.config.get("lr")),
            *(run.metrics.get(name) for name in names),
            *(run.seconds["train"], run.peak_bytes),
        ]
        for s in settings
        for run in s.runs
    ]
    columns = ["method", "seed", "status", "lr", *names, "train time (s)", "peak memory (bytes)"]
    files.write_text(folder / "runs.csv", csv_text(columns, single))


def _tiles(usable: Sequence[Setting], merge: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    """The few numbers at the top of the page: what, value, explanation, and its colour."""
    tiles: list[tuple[str, ...]] = []
    best = best_of(usable)
    if best is not None:
        metric, error = best.first.metric, best.standard_error
        about = best.label + (
            "" if error is None else f"; standard error {words.amount(metric, error)}"
        )
        tiles.append((f"Best {metric}", words.score(metric, best.score), about, ""))
    lora = smallest_first(usable)
    enough, top = smallest_not_told_apart(lora), best_of(lora)
    known = top is not None and noise_of([(1.0, top)]) is not None
    if enough is not None and top is not None and known and len(lora) > 1:
        about = f"{enough.label}; not told apart from {top.label}"
        if enough is top:
            about = f"{enough.label}, the best of those tried"
        tiles.append(("Smallest LoRA within the noise", f"r = {enough.first.rank}", about, ""))
        counts = enough.first.counts
        about = f"{counts.trainable:,} parameters beside {counts.base:,} in the base"
        tiles.append(
            (f"Trained at r = {enough.first.rank}", words.percent(counts.share), about, "")
        )
    if merge is not None:
        tone = "good" if merge["good"] else "bad"
        tiles.append(("Merge", merge["verdict"], f"certificate in {merge['dtype']}", tone))
    return tiles


def _short_source(source: str) -> str:
    """Where a base comes from; of a path, the last two parts."""
    return source if len(source) <= 40 else "/".join(re.split(r"[/\\]", source)[-2:])


def _small(value: float) -> str:
    """A number of a certificate, to two digits."""
    return f"{value:.2g}" if math.isfinite(value) else "not finite"
