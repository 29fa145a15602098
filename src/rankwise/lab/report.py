"""The report of a comparison: one self-contained HTML page, a pure function of run records."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from rankwise.errors import ArtifactError, EnvironmentFault, UserError, gather
from rankwise.lab import figures, words
from rankwise.lab.drawing import Cell, Figure
from rankwise.lab.energy import Spectra, update_spectrum
from rankwise.lab.findings import (
    best_of,
    check_comparable,
    findings,
    gap_closed,
    lora_by_rank,
    pairs_of,
    smallest_not_told_apart,
)
from rankwise.lab.records import RunRecord
from rankwise.lab.settings import Setting, group_runs

__all__ = ["Check", "summary_table", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Check:
    """One line of a merge certificate: what merging moved, what is allowed, what the adapter does.

    A number that the certificate gives as null is NaN here. ``passed`` is the certificate's own
    verdict on the line, True where it gives none.
    """

    name: str
    error: float
    bound: float
    effect: float
    passed: bool

    @property
    def within(self) -> bool:
        """True when the error is a number no larger than the bound, and nothing else failed."""
        return self.passed and self.error <= self.bound


def write_report(
    path: str | Path,
    *,
    title: str,
    runs: Sequence[RunRecord],
    certificate: Mapping[str, Any] | None = None,
    spectra: Spectra | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write one HTML page that shows what ``runs`` found, and return its path.

    The page needs no network and no scripts. The same arguments give the same bytes. The file
    appears whole or not at all, and its folder is made where there is none.

    ``certificate`` is the merge certificate: passed, dtype, layers (name, error, bound, effect),
    outputs (error, effect, tolerance; or None without a probe), finite, sha256 (base, adapter,
    merged; each may be None), probe, and where there are any, problems. ``spectra`` maps the name
    of a layer to the singular values of its update.

    Raises:
        UserError: there are no runs, the runs cannot be compared, or the path is a folder.
        ArtifactError: the certificate lacks a part, or holds one of the wrong kind.
        EnvironmentFault: Matplotlib or Jinja2 is missing, or the file cannot be written.
    """
    check_comparable(runs)
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give the name of the HTML file to write.")
    page = _page(title, group_runs(runs), certificate, spectra or {}, notes)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(page)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"The report {path} cannot be written: {error}.") from error
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


# The page


def _page(
    title: str,
    settings: Sequence[Setting],
    certificate: Mapping[str, Any] | None,
    spectra: Spectra,
    notes: Sequence[str],
) -> bytes:
    """The bytes of the page."""
    try:
        import jinja2
    except ImportError as error:
        raise EnvironmentFault(
            f"A report needs Jinja2, which cannot be imported ({error}). "
            'Install it with: pip install "rankwise[report]"'
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "csv_link": _csv_link, "tie": _tie}
    merge = None if certificate is None else _certificate(certificate)
    drawn, missing = _figures(settings, spectra)
    runs = [run for setting in settings for run in setting.runs]
    usable = [setting for setting in settings if setting.usable]
    columns, rows = _table(settings)
    metric = runs[0].metric
    html = environment.get_template("report.html.jinja").render(
        title=title,
        css=(TEMPLATES / "report.css").read_text("utf-8"),
        runs=runs,
        source=_short_source(runs[0].base["source"]),
        metric=metric,
        tiles=_tiles(usable, merge),
        sentences=findings(runs, spectra),
        columns=columns,
        rows=rows,
        gaps=gap_closed(usable),
        pairs=pairs_of(usable),
        amount=lambda value: "–" if value is None else words.amount(metric, value),
        percent=words.percent,
        small=_small,
        figures=drawn,
        missing=missing,
        merge=merge,
        facts=_facts(runs),
        shared=_shared_options(runs),
        own=_own_options(settings),
        notes=[*notes, *dict.fromkeys(note for run in runs for note in run.notes)],
    )
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", html)
    return clean.encode("utf-8", "replace")


def _figures(settings: Sequence[Setting], spectra: Spectra) -> tuple[list[Figure], list[str]]:
    """The figures the records allow, and why the others are missing."""
    builders: tuple[tuple[Callable[[], Figure | None], str], ...] = (
        (lambda: figures.quality_by_rank(settings), "against the rank: no LoRA run has a score"),
        (lambda: figures.quality_by_size(settings), "against trained parameters: no run is scored"),
        (lambda: figures.training_curves(settings), "of training loss: none was logged"),
        (lambda: figures.evaluation_curves(settings), "of evaluations: none was logged"),
        (lambda: update_spectrum(spectra), "of singular values: no learned update given"),
        (lambda: figures.wall_time(settings), "of wall time: none was recorded"),
    )
    drawn: list[Figure] = []
    missing: list[str] = []
    for build, reason in builders:
        figure = build()
        if figure is None:
            missing.append(reason)
        else:
            drawn.append(figure)
    return drawn, missing


def _table(settings: Sequence[Setting]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of the summary, as text, for the page and the terminal alike."""
    metric = settings[0].first.metric
    columns = ["method", "r", "α", metric, "± SE", "formula", "counted", "trained", "% of base"]
    columns += ["train time", "file size"]
    several = any(len(s.runs) > 1 for s in settings)
    columns += ["seeds"] if several else []
    rows: list[list[str]] = []
    for setting in settings:
        run, counts = setting.first, setting.first.counts
        error = setting.standard_error
        rows.append(
            [
                setting.label,
                "–" if run.rank is None else str(run.rank),
                "–" if run.alpha is None else f"{run.alpha:g}",
                words.score(metric, setting.score),
                "–" if error is None else words.amount(metric, error, unit=False),
                "–" if counts.adapter_formula is None else f"{counts.adapter_formula:,}",
                f"{counts.adapter:,}",
                f"{counts.trainable:,}",
                words.percent(counts.share),
                words.duration(setting.seconds),
                "–" if run.artifact_bytes is None else words.size(run.artifact_bytes),
                *([str(len(setting.runs))] if several else []),
            ]
        )
    return columns, rows


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
    lora = lora_by_rank(usable)
    enough, top = smallest_not_told_apart(lora), best_of(lora)
    if enough is not None and top is not None and top.standard_error is not None and len(lora) > 1:
        about = f"of those tried; not told apart from r = {top.first.rank}"
        if enough is top:
            about = "of those tried, and the best of them"
        tiles.append(("Smallest rank within noise", f"r = {enough.first.rank}", about, ""))
        counts = enough.first.counts
        about = f"{counts.trainable:,} parameters beside {counts.base:,} in the base"
        tiles.append(
            (f"Trained at r = {enough.first.rank}", words.percent(counts.share), about, "")
        )
    if merge is not None:
        tone = "good" if merge["good"] else "bad"
        tiles.append(("Merge", merge["verdict"], f"certificate in {merge['dtype']}", tone))
    return tiles


def _certificate(given: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate as the page shows it, checked part by part."""
    problems: list[str] = []

    def take(source: Mapping[str, Any], key: str, kinds: tuple[type, ...], where: str = "") -> Any:
        value = source.get(key)
        allowed = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if key not in source:
            problems.append(f"'{where}{key}' is missing.")
        elif not allowed:
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            problems.append(f"'{where}{key}' must be {names}, got {value!r:.60}.")
        return value if allowed else None

    def check(row: Any, where: str, name: str | None, allowed: str) -> Check:
        found = cast("Mapping[str, Any]", row) if isinstance(row, Mapping) else {}
        label = take(found, "name", (str,), where) if name is None else name
        numbers = [
            take(found, key, (int, float, type(None)), where)
            for key in ("error", allowed, "effect")
        ]
        error, bound, effect = (math.nan if n is None else float(n) for n in numbers)
        return Check(str(label), error, bound, effect, found.get("passed", True) is True)

    listed = take(given, "layers", (list, tuple)) or []
    layers = [check(row, f"layers[{i}].", None, "bound") for i, row in enumerate(listed)]
    outputs = take(given, "outputs", (Mapping, type(None)))
    output = None if outputs is None else check(outputs, "outputs.", "outputs", "tolerance")
    hashes = take(given, "sha256", (Mapping,)) or {}
    text = (str, type(None))
    view: dict[str, Any] = {
        "passed": take(given, "passed", (bool,)),
        "finite": take(given, "finite", (bool,)),
        "dtype": take(given, "dtype", (str,)),
        "probe": take(given, "probe", (str,)),
        "sha256": {k: take(hashes, k, text, "sha256.") for k in ("base", "adapter", "merged")},
    }
    gather(ArtifactError, "The merge certificate is not complete", problems)
    agrees = view["finite"] and all(c.within for c in [*layers, *([output] if output else [])])
    contradiction = view["passed"] and not agrees
    verdict = "passed" if view["passed"] else "failed"
    return view | {
        "layers": layers,
        "output": output,
        "over": [layer for layer in layers if not layer.within],
        "problems": [str(problem) for problem in given.get("problems", ())],
        "contradiction": contradiction,
        "good": view["passed"] and agrees,
        "verdict": "in doubt" if contradiction else verdict,
    }


def _facts(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
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


def _shared_options(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """The options that every run had, with the value they all share."""
    first = runs[0].config
    return [
        (key, words.plain(value))
        for key, value in sorted(first.items())
        if all(key in run.config and run.config[key] == value for run in runs)
    ]


def _own_options(settings: Sequence[Setting]) -> list[tuple[str, int, str]]:
    """Method and remaining options of each run, as one line of text each."""
    runs = [(s.label, run) for s in settings for run in s.runs]
    said = {key for key, _ in _shared_options([run for _, run in runs])}
    said |= {key for _, run in runs for key in run.method} | {"out", "seed"}
    lines: list[tuple[str, int, str]] = []
    for label, run in runs:
        rest = {k: v for k, v in sorted(run.config.items()) if k not in said}
        parts = [f"{k} = {words.brief(v)}" for k, v in {**run.method, **rest}.items()]
        lines.append((label, run.seed, "; ".join(parts)))
    return lines


def _short_source(source: str) -> str:
    """Where a base comes from; of a path, the last two parts."""
    return source if len(source) <= 40 else "/".join(re.split(r"[/\\]", source)[-2:])


def _small(value: float) -> str:
    """A number of a certificate, to two digits."""
    return f"{value:.2g}" if math.isfinite(value) else "not finite"


def _tie(text: str) -> str:
    """The text with a number kept on one line with its sign and its unit."""
    return re.sub(r"(?<=\d) (?=%|points\b)|(?<=\br) (?==)|(?<=\br =) |(?<=±) ", "\u00a0", text)


def _cell(value: Cell) -> str:
    """One number of a figure's table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _csv_link(figure: Figure) -> str:
    """A figure's numbers as the address of a download that is part of the page."""
    return "data:text/csv;charset=utf-8," + quote(figure.csv().encode("utf-8", "replace"))
