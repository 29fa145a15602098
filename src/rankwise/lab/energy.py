"""Energy of a learned update: the rank that holds most of it, and its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rankwise.errors import UserError
from rankwise.lab import words
from rankwise.lab.drawing import MUTED, Cell, Figure, Key, Style, line_swatch, name_axes, render
from rankwise.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ENERGY", "PERCENT", "Spectra", "rank_holding", "update_spectrum"]

Spectra = Mapping[str, Sequence[float]]
"""Singular values of the learned update by the name of the layer."""
ENERGY = 0.9
"""Share of the update's energy whose rank is marked in the figure of singular values."""
PERCENT = f"{100 * ENERGY:g} %"


def rank_holding(values: Sequence[float], share: float = ENERGY) -> int | None:
    """The smallest k whose k largest singular values hold ``share`` of the energy Σ σ².

    None when the update is zero; see :meth:`rankwise.spectrum.Spectrum.holding`.
    """
    return Spectrum(tuple(sorted(values, reverse=True))).holding(share) or None


def update_spectrum(spectra: Spectra) -> Figure | None:
    """Cumulative energy of each layer's learned update over its singular values.

    Formula: the share of the first k is Σ_{i≤k} σᵢ² / Σ σᵢ². Layers are coloured by the last part
    of their name. None when there is no layer, or every update is zero.

    Raises:
        UserError: a singular value is negative or not finite.
    """
    _check_spectra(spectra)
    drawn = {name: _cumulative(values) for name, values in spectra.items() if any(values)}
    if not drawn:
        return None
    parts = list(dict.fromkeys(name.rpartition(".")[2] for name in drawn))
    longest = max(map(len, drawn.values()))

    def paint(axes: Axes) -> None:
        axes.axhline(100 * ENERGY, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        for name, shares in drawn.items():
            style = Style.category(parts.index(name.rpartition(".")[2]))
            path = list(enumerate([0.0, *(100 * share for share in shares)]))
            axes.plot(*zip(*path, strict=True), **style.line(), linewidth=1, alpha=0.55)
        for name, values in spectra.items():
            if (k := rank_holding(values)) is not None:
                style = Style.category(parts.index(name.rpartition(".")[2]))
                at = 100 * drawn[name][k - 1]
                axes.plot([k], [at], color=style.colour, marker=style.marker, markersize=5)
        axes.set_ylim(0, 103)
        axes.set_xlim(0, longest * 1.02)
        axes.locator_params(axis="x", integer=True)
        name_axes(axes, "singular values kept, largest first", "energy held (%)")

    rows: list[tuple[Cell, ...]] = []
    for name, values in spectra.items():
        shares = _cumulative(values) or [None] * len(values)
        ordered = sorted(values, reverse=True)
        k90 = rank_holding(values)
        rows += [
            (name, k, s, share, k90)
            for k, (s, share) in enumerate(zip(ordered, shares, strict=True), 1)
        ]
    held = [k for values in spectra.values() if (k := rank_holding(values)) is not None]
    zero = len(spectra) - len(drawn)
    return Figure(
        name="update-spectrum",
        title="Energy of the learned update",
        alt=f"Line chart of the cumulative energy of the singular values of {len(drawn)} layers; "
        f"{PERCENT} is reached at k = {words.spread(held)}.",
        caption=f"One line per layer; the mark is the smallest rank that holds {PERCENT} of the "
        "energy (the sum of squared singular values of the update)."
        + (f" Layers whose update is exactly zero are not drawn: {zero}." if zero else ""),
        svg=render("update-spectrum", 300, paint),
        key=(
            *(Key(part, Style.category(i).swatch()) for i, part in enumerate(parts)),
            Key(f"{PERCENT} of the energy", line_swatch("var(--muted)", "2 2")),
        ),
        columns=("layer", "k", "singular value", "energy held", f"rank for {PERCENT}"),
        rows=tuple(rows),
    )


def _cumulative(values: Sequence[float]) -> list[float]:
    """Shares of Σ σ² held by the first k values, k = 1, 2, ...; empty when all are zero."""
    largest = max(values, default=0.0)
    if largest == 0:
        return []
    energy = [(value / largest) ** 2 for value in sorted(values, reverse=True)]
    total = math.fsum(energy)
    return [math.fsum(energy[: k + 1]) / total for k in range(len(energy))]


def _check_spectra(spectra: Spectra) -> None:
    for name, values in spectra.items():
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise UserError(
                f"The singular values of {name} must be finite and not negative, got "
                f"{list(values)!r:.120}. Compute them from a trained adapter without NaN."
            )
