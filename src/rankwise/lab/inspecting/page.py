"""What an inspection says in words and as a page: one self-contained HTML file, from the record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rankwise.io import files
from rankwise.lab import words
from rankwise.lab.drawing import Cell, Figure
from rankwise.lab.inspecting.figures import overlap_map, value_map
from rankwise.lab.inspecting.records import SHARES, Inspection
from rankwise.lab.page import fill
from rankwise.lab.report import Section
from rankwise.spectrum import Spectrum

__all__ = ["COLUMNS", "RECORDS", "REPORT", "layer_rows", "summary", "write_inspection"]

RECORDS, REPORT = "inspection.json", "report.html"
COLUMNS = ("layer", "r", "‖δ‖", "stable", "entropy", "90 %", "99 %", "99.9 %", "gap")
BASE_COLUMNS = ("‖δ‖/‖W0‖", "amplifies")
OTHER_COLUMNS = ("φ reads", "by chance", "φ writes")


def summary(found: Inspection) -> list[str]:
    """What an adapter is, in sentences."""
    return [*_size(found), *_ranks(found), *_base(found), *_other(found)]


def write_inspection(found: Inspection, folder: str | os.PathLike[str]) -> Path:
    """Write the record and its page into a folder; files of other names are left alone.

    Returns the page.

    Raises:
        EnvironmentFault: Matplotlib or Jinja2 is not installed, or the disk refuses.
    """
    home = Path(folder)
    drawn = [f for f in (value_map(found.layers), overlap_map(found.layers)) if f is not None]
    sections = [
        Section("found", "What was found", tuple(summary(found)), (*drawn, _table(found))),
        Section("read", "What was read, and what the numbers do not cover", found.notes),
    ]
    page = fill(
        "evidence.html.jinja",
        kind="Rankwise inspection",
        title=f"The updates of {Path(found.adapter).name}",
        lead="Singular values of δ = s · B A, layer by layer: how much rank the update uses.",
        sections=sections,
        source=RECORDS,
    )
    files.write_json(home / RECORDS, found.to_json())
    return files.write_bytes(home / REPORT, page)


def columns(found: Inspection) -> tuple[str, ...]:
    """The columns of :func:`layer_rows`."""
    base = BASE_COLUMNS if found.base is not None else ()
    return (*COLUMNS, *base, *(OTHER_COLUMNS if found.other is not None else ()))


def layer_rows(found: Inspection) -> Iterator[tuple[Cell, ...]]:
    """One row of numbers for each layer."""
    for layer in found.layers:
        s = layer.spectrum
        row: list[Cell] = [layer.name, layer.r, s.norm, s.stable_rank, s.entropy_rank]
        row.extend(s.holding(share) for share in SHARES)
        row.append(None if s.gap is None else f"{s.gap.k} ({_fall(s)})")
        if found.base is not None:
            row.extend((layer.relative, layer.amplification))
        if found.other is not None:
            o = layer.overlap
            row.extend((None,) * 3 if o is None else (o.reads, o.chance, o.writes))
        yield tuple(row)


def _table(found: Inspection) -> Figure:
    return Figure(
        name="layers",
        title="Every layer",
        alt="Table of ranks and norms, layer by layer.",
        caption="stable: ‖δ‖²_F / ‖δ‖²₂; entropy: the effective rank; 90 %, 99 % and 99.9 %: the "
        "ranks that hold so much of the energy Σ σ²; gap: the rank behind which the singular "
        "values fall most, and by how much.",
        svg="",
        key=(),
        columns=columns(found),
        rows=tuple(layer_rows(found)),
    )


def _size(found: Inspection) -> Iterator[str]:
    ranks = words.spread([layer.r for layer in found.layers])
    yield (
        f"{words.count(len(found.layers), 'layer')} with updates of rank {ranks}, "
        f"{found.parameters:,} parameters."
    )
    zero = [layer.name for layer in found.layers if not layer.spectrum.rank]
    if zero:
        yield f"{len(zero)} of the updates are exactly zero, the first being that of '{zero[0]}'."


def _ranks(found: Inspection) -> Iterator[str]:
    if not found.trained:
        return
    live = [layer.spectrum for layer in found.layers if layer.spectrum.rank]
    for share in SHARES[1:]:
        each = words.spread([s.holding(share) for s in live])
        together = found.holding(share)
        assert together is not None
        yield (
            f"{words.percent(share)} of the energy: {each} singular values in each layer by "
            f"itself; over all layers together {together.parameters:,} parameters, "
            f"{words.percent(together.parameters / found.parameters)} of the adapter."
        )
    gaps = [s.gap.k for s in live if s.gap is not None]
    if gaps:
        ratio = median(s.gap.ratio for s in live if s.gap is not None)
        to_zero = all(s.gap.k == s.rank for s in live if s.gap is not None)
        how = "to zero" if to_zero else f"by a factor of {ratio:.3g} in the median"
        yield f"The singular values fall most behind k = {words.spread(gaps)}, {how}."


def _fall(found: Spectrum) -> str:
    """How far the singular values fall behind the gap: the zero behind the last is no number."""
    assert found.gap is not None
    return "to zero" if found.gap.k == found.rank else f"×{found.gap.ratio:.3g}"


def _base(found: Inspection) -> Iterator[str]:
    relative = [layer.relative for layer in found.layers if layer.relative is not None]
    if relative:
        yield (f"‖δ‖ is {words.percent(min(relative))} to {words.percent(max(relative))} of ‖W0‖.")
    factors = [layer.amplification for layer in found.layers if layer.amplification is not None]
    if factors:
        yield (
            f"Along its own directions δ is {min(factors):.3g} to {max(factors):.3g} times as "
            f"strong as W0, {median(factors):.3g} in the median."
        )


def _other(found: Inspection) -> Iterator[str]:
    shared = [layer.overlap for layer in found.layers if layer.overlap is not None]
    if found.other is None:
        return
    missing = len(found.layers) - len(shared)
    if missing:
        yield f"{missing} of the layers have no update, or a zero one, in '{found.other}'."
    if shared:
        reads, by_chance = median(o.reads for o in shared), median(o.chance for o in shared)
        yield (
            f"Beside '{found.other}': φ of all directions read is {reads:.3g} in the median, where "
            f"random ones would have {by_chance:.3g}; of the first directions "
            f"{median(o.reads_top for o in shared):.3g}."
        )
