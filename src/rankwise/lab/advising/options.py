"""What an advice is asked for: the options of its probes, and of the run that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import UserError
from rankwise.train.config import FitConfig, make_config

__all__ = ["FIRST_R", "LARGEST_R", "TUNING_SHARE", "Advise", "without_rank"]

FIRST_R, LARGEST_R = 8, 64
"""Ranks of the first probe and of the last where none is given; each has twice the rank before."""
TUNING_SHARE = 0.2
"""Share of the training rows that cuts are tried on where none is given."""


@dataclass(frozen=True)
class Advise:
    """The options of ``rankwise fit`` for a LoRA run, its ``r`` and ``alpha`` being the probe's.

    Without an ``r`` there may be several probes, of ranks 8, 16, 32 and 64; ``alpha`` is that of
    rank 8 then, and a larger probe has the same s.

    Attributes:
        given: the options that were given, by name; ``out`` is the folder of the advice.
    """

    given: Mapping[str, Any]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the probes, smallest first; a larger one is trained only where it is needed."""
        if "r" in self.given:
            return (int(self.given["r"]),)
        powers = range(FIRST_R.bit_length() - 1, LARGEST_R.bit_length())
        return tuple(2**power for power in powers)

    @property
    def out(self) -> Path:
        return Path(str(self.given.get("out", "")))

    def probe(self, r: int) -> FitConfig:
        """The run of a probe: what is given, trained on a part of the training rows, the last kept.

        Cuts are tried on the rest of the training rows. Rows to evaluate on (``eval``) are left
        for the run that follows and choose nothing here.

        Raises:
            UserError: lists what is wrong.
        """
        values = {k: v for k, v in self.given.items() if k != "eval"}
        if values.get("method", "lora") != "lora":
            raise UserError("Ranks are those of LoRA; leave --method out.")
        if values.get("rank_pattern") or values.get("alpha_pattern"):
            raise UserError(
                "The probe has one rank everywhere, and the ranks by layer are what is looked for: "
                "leave rank_pattern and alpha_pattern out."
            )
        if values.get("alpha") is not None:
            values["alpha"] = _scaled(values, self.ranks[0], r)
        values = {"eval_fraction": TUNING_SHARE, **values, "r": r, "select": "last"}
        where = "The options of rankwise advise"
        named = make_config(values, where)
        return named.model_copy(update={"out": str(Path(named.out) / f"probe-r{r}")})

    def advised(self, probe: FitConfig, ranks: Mapping[str, int]) -> FitConfig:
        """The run to train: these ranks, s as the probe had it, everything else as given.

        s is α/r, or α/√r where rank_stabilized is asked for, so that α follows the rank.
        """
        kept = {name: k for name, k in ranks.items() if k}
        r = max(set(kept.values()), key=lambda k: (list(kept.values()).count(k), k))
        of_probe = {"alpha": probe.alpha, "rank_stabilized": probe.rank_stabilized}
        others = {name: k for name, k in kept.items() if k != r}
        drop = {"r", "alpha", "out", "exclude_modules"}
        values: dict[str, Any] = {k: v for k, v in self.given.items() if k not in drop}
        gone = [name for name, k in ranks.items() if not k]
        values |= {
            "r": r,
            "alpha": _scaled(of_probe, probe.r, r),
            "rank_pattern": others,
            "alpha_pattern": {name: _scaled(of_probe, probe.r, k) for name, k in others.items()},
            "exclude_modules": [*probe.exclude_modules, *gone],
            "out": str(self.out / "advised"),
        }
        return make_config(values, "The advised configuration")


def without_rank(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run without its rank, for an advice that looks for it; s stays.

    An ``alpha`` becomes that of the first probe.
    """
    r, others = values.get("r"), {k: v for k, v in values.items() if k != "r"}
    if isinstance(r, int) and r > 0 and isinstance(others.get("alpha"), (int, float)):
        others["alpha"] = _scaled(others, r, FIRST_R)
    return others


def _scaled(values: Mapping[str, Any], r: int, k: int) -> float:
    """α at rank k that has the s of ``values`` at rank r: s = α/r, or α/√r if rank-stabilised."""
    power = 0.5 if values.get("rank_stabilized") else 1.0
    return float(values["alpha"]) * k**power / r**power
