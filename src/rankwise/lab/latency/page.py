"""The page of latency and its sentences: a pure function of the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rankwise.lab import words
from rankwise.lab.drawing import Figure
from rankwise.lab.latency import figures
from rankwise.lab.latency.records import MERGED, PLAIN, Interval, LatencyRecord
from rankwise.lab.page import fill

__all__ = ["findings", "make_page", "over", "pictures"]


def pictures(record: LatencyRecord) -> tuple[Figure, ...]:
    """The figures of the page.

    Raises:
        EnvironmentFault: Matplotlib is not installed.
    """
    return figures.overhead(record), figures.passes(record)


def make_page(record: LatencyRecord, drawn: Sequence[Figure]) -> bytes:
    """The page of a record and its :func:`pictures`; the same record gives the same bytes.

    Raises:
        EnvironmentFault: Jinja2 is not installed.
    """
    found = findings(record)
    return fill(
        "latency.html.jinja",
        title="What a forward pass costs with an adapter",
        model=record.model,
        same=record.sameness.same,
        found=found,
        variants=[(v.name, v.added, v.operators, v.flops) for v in record.variants],
        figures=drawn,
        facts=_facts(record),
        notes=record.notes,
    )


def over(found: Interval) -> str:
    """A ratio to the plain model as percent over it: "+3.1 (2.8 to 3.5)"."""
    middle, low, high = (100 * (x - 1) for x in (found.middle, found.low, found.high))
    return f"{middle:+.1f} ({low:.1f} to {high:.1f})"


def findings(record: LatencyRecord) -> list[str]:
    """What was found, in sentences: the merged model first, by what it runs and not by its time."""
    same = record.sameness
    parts = {
        "its modules are of the same types": same.modules,
        "it runs the same operators, each as often": same.operators,
        "it does the same number of floating-point operations": same.flops,
        f"its outputs are those of the unmerged model to {same.error:.3g}, where the certificate "
        f"allows {same.tolerance:.3g} and the adapter's effect is {same.effect:.3g}": same.outputs,
    }
    lead = (
        "The merged model is the plain model's computation"
        if same.same
        else ("The merged model is NOT the plain model's computation")
    )
    told = [text if holds else f"NOT: {text}" for text, holds in parts.items()]
    sentences = [f"{lead}: {'; '.join(told)}."]
    for variant in record.variants:
        if variant.name in (PLAIN, MERGED):
            continue
        ratios = {cell: record.ratio(variant.name, *cell) for cell in record.cells}
        worst, best = (pick(ratios, key=lambda c: ratios[c].middle) for pick in (max, min))
        least = f"{over(ratios[best])} % over plain at {_size(best)}"
        most = f" to {over(ratios[worst])} % at {_size(worst)}"
        one = worst == best
        sentences.append(f"{variant.name}: {least}." if one else f"{variant.name}: {least}{most}.")
    return sentences


def _size(cell: tuple[int, int]) -> str:
    return f"{cell[0]} × {cell[1]}"


def _facts(record: LatencyRecord) -> list[tuple[str, str]]:
    def pairs(mapping: Mapping[str, Any]) -> str:
        return ", ".join(f"{k} {words.plain(v)}" for k, v in mapping.items() if v is not None)

    return [
        ("Model", f"{record.model}, random weights, {record.task}"),
        ("Measured", pairs(asdict(record.sizes))),
        ("Methods", pairs(record.options)),
        ("Code", pairs(record.code)),
        ("Versions", pairs(record.versions)),
        ("Hardware", pairs(record.hardware)),
    ]
