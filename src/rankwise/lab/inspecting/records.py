"""What was seen of an adapter, layer by layer, as frozen records that JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.spectrum import Allocation, Energy, Layer, Spectrum

__all__ = ["SHARES", "Inspection", "LayerEvidence", "Overlap"]

SHARES = (0.9, 0.99, 0.999)
"""Shares of the energy whose ranks are told."""


@dataclass(frozen=True)
class Overlap:
    """How alike the directions of two updates of one layer are. docs/math.md (24).

    Attributes:
        first, second: how many directions each has.
        reads: φ of all directions on the side of the inputs; ``reads_top`` of the first of each.
        writes: the same on the side of the outputs.
        chance: what φ of all would be on the side of the inputs for random directions.
        grid: φ(i, j) on the side of the inputs.
    """

    first: int
    second: int
    reads: float
    reads_top: float
    writes: float
    writes_top: float
    chance: float
    grid: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LayerEvidence:
    """What the update of one layer is.

    Attributes:
        name: of the layer.
        outputs, inputs: its size.
        r: rank of the factors, as trained.
        scale: s.
        parameters: in A and B.
        spectrum: singular values of δ.
        base_norm: ‖W0‖_F; None without the base or where it has no such weight, as the next.
        amplification: ‖δ‖_F / ‖Uᵀ W0 V‖_F; also None for a zero update.
        overlap: with another adapter; None without one, and where either is zero there.
    """

    name: str
    outputs: int
    inputs: int
    r: int
    scale: float
    parameters: int
    spectrum: Spectrum
    base_norm: float | None = None
    amplification: float | None = None
    overlap: Overlap | None = None

    @property
    def relative(self) -> float | None:
        """‖δ‖_F / ‖W0‖_F."""
        return self.spectrum.norm / self.base_norm if self.base_norm else None

    @property
    def layer(self) -> Layer:
        """The layer as ranks are chosen among: one rank costs the parameters of A and B over r."""
        return Layer(self.spectrum, self.parameters // self.r)

    def to_json(self) -> dict[str, Any]:
        """Every number, the derived ones too."""
        own, found = asdict(self), self.spectrum
        return {k: v for k, v in own.items() if k != "spectrum"} | {
            "relative_norm": self.relative,
            "singular_values": list(found.values),
            "norm": found.norm,
            "spectral_norm": found.spectral,
            "rank": found.rank,
            "stable_rank": found.stable_rank,
            "entropy_rank": found.entropy_rank,
            "rank_holding": {f"{share:g}": found.holding(share) for share in SHARES},
            "gap": None if found.gap is None else asdict(found.gap),
        }


@dataclass(frozen=True)
class Inspection:
    """An adapter as it was seen.

    Attributes:
        adapter: where it lies.
        layers: by adapted weight, in the adapter's order.
        base: what W0 was read from; None where it was not.
        other: the adapter it was compared with; None without one.
        notes: what was read, and what of the adapter the numbers do not cover.
    """

    adapter: str
    layers: tuple[LayerEvidence, ...]
    base: str | None = None
    other: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def trained(self) -> bool:
        """Whether any update is other than zero."""
        return any(layer.spectrum.rank for layer in self.layers)

    def holding(self, share: float) -> Allocation | None:
        """The fewest parameters that hold a share of the energy; None for an untrained adapter."""
        every: Mapping[str, Layer] = {layer.name: layer.layer for layer in self.layers}
        return Energy(share).allocate(every) if self.trained else None

    def to_json(self) -> dict[str, Any]:
        """The record, for records.json and ``--json``."""
        together = {f"{share:g}": self.holding(share) for share in SHARES}
        return {
            "kind": "rankwise inspection 1",
            "adapter": self.adapter,
            "base": self.base,
            "other": self.other,
            "parameters": self.parameters,
            "parameters_holding": {
                share: None if found is None else found.parameters
                for share, found in together.items()
            },
            "notes": list(self.notes),
            "layers": [layer.to_json() for layer in self.layers],
        }
