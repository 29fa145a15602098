"""What was measured of forward passes, as frozen records, and the intervals that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rankwise.errors import UserError, gather

__all__ = ["FORMAT", "Interval", "LatencyRecord", "Sameness", "Sizes", "Timing", "Variant"]

FORMAT = 1
PLAIN, MERGED, UNMERGED = "plain", "merged", "LoRA, unmerged"
_DRAWS = 2000


@dataclass(frozen=True)
class Sizes:
    """Which passes are measured, and how often.

    Attributes:
        batches: rows of a pass.
        lengths: tokens of a row; each goes with each batch.
        rounds: times that each variant is measured at each size.
        seed: of the random weights, of the tokens and of the order within a round.

    Raises:
        UserError: a size is below 1, or there are too few rounds; everything wrong is listed.
    """

    batches: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] = (32, 128)
    rounds: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be whole numbers of 1 or more, got {values or 'none'}."
            for name, values in (("batch sizes", self.batches), ("lengths", self.lengths))
            if not values or min(values) < 1
        ]
        if self.rounds < 3:
            problems.append(f"rounds must be 3 or more for an interval, got {self.rounds}.")
        gather(UserError, "Nothing can be measured so", problems)


@dataclass(frozen=True)
class Variant:
    """One model that is measured.

    Attributes:
        name: for a reader.
        added: parameters beside those of the plain model.
        operators: that a forward pass runs, of the first size.
        flops: of its matrix products and attention, by torch.utils.flop_counter.
    """

    name: str
    added: int
    operators: int
    flops: int


@dataclass(frozen=True)
class Sameness:
    """Whether the merged model runs the very computation of the plain one.

    Attributes:
        modules: every module is of the same type under the same name.
        operators: the same operators run, each as many times.
        flops: and do the same number of floating-point operations.
        outputs: the merged outputs are those of the unmerged model to the certificate's tolerance.
        error: the largest difference of an output.
        tolerance: the certificate's.
        effect: the largest change of an output by the adapter.
    """

    modules: bool
    operators: bool
    flops: bool
    outputs: bool
    error: float
    tolerance: float
    effect: float

    @property
    def same(self) -> bool:
        """Whether all of it holds."""
        return self.modules and self.operators and self.flops and self.outputs


@dataclass(frozen=True)
class Interval:
    """A median with the ends of its 95 % interval."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Seconds of a forward pass of one variant at one size, one number for each round."""

    variant: str
    batch: int
    length: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class LatencyRecord:
    """Everything that was measured, and on what; tables and page are functions of this alone.

    ``options`` are those of the methods, ``code``, ``versions`` and ``hardware`` as in the manifest
    of a run.
    """

    model: str
    task: str
    sizes: Sizes
    options: Mapping[str, Any]
    variants: tuple[Variant, ...]
    sameness: Sameness
    timings: tuple[Timing, ...]
    notes: tuple[str, ...] = ()
    code: Mapping[str, Any] = field(default_factory=dict[str, Any])
    versions: Mapping[str, Any] = field(default_factory=dict[str, Any])
    hardware: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """The sizes that were measured, (batch, length)."""
        return tuple(dict.fromkeys((t.batch, t.length) for t in self.timings))

    def seconds(self, variant: str, batch: int, length: int) -> Interval:
        """The median time of a variant at a size."""
        return _interval(self._of(variant, batch, length))

    def ratio(self, variant: str, batch: int, length: int) -> Interval:
        """The median of the ratios of a variant's time to the plain one's in the same round."""
        plain = self._of(PLAIN, batch, length)
        return _interval(self._of(variant, batch, length) / plain)

    def _of(self, variant: str, batch: int, length: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        wanted = (variant, batch, length)
        (found,) = (t for t in self.timings if (t.variant, t.batch, t.length) == wanted)
        return np.asarray(found.seconds)


def _interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> Interval:
    """The median, and the ends between which 95 % of the medians of redrawn samples lie.

    The bootstrap of Efron 1979 by percentiles, the same draws for the same number of values.
    """
    draws = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), (0.025, 0.975))
    return Interval(float(np.median(values)), float(low), float(high))
