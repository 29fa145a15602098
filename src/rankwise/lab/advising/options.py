"""What an advice is asked for: the options of its probe, and of the run that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import UserError
from rankwise.train.config import FitConfig, make_config

__all__ = ["PROBE_R", "TUNING_SHARE", "Advise"]

PROBE_R = 32
"""Rank of the probe where none is given."""
TUNING_SHARE = 0.2
"""Share of the training rows that cuts are tried on where none is given."""


@dataclass(frozen=True)
class Advise:
    """The options of ``rankwise fit`` for a LoRA run, its ``r`` and ``alpha`` being the probe's.

    Attributes:
        given: the options that were given, by name; ``out`` is the folder of the advice.
    """

    given: Mapping[str, Any]

    @property
    def r(self) -> int:
        """Rank of the probe."""
        return int(self.given.get("r", PROBE_R))

    @property
    def out(self) -> Path:
        return Path(str(self.given.get("out", "")))

    def probe(self) -> FitConfig:
        """The probe's run: what is given, trained on a part of the training rows, the last kept.

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
        values = {"eval_fraction": TUNING_SHARE, **values, "r": self.r, "select": "last"}
        where = "The options of rankwise advise"
        named = make_config(values, where)
        return named.model_copy(update={"out": str(Path(named.out) / "probe")})

    def advised(self, ranks: Mapping[str, int]) -> FitConfig:
        """The run to train: these ranks, s as the probe had it, everything else as given.

        s is α/r, or α/√r where rank_stabilized is asked for, so that α follows the rank.
        """
        kept = {name: k for name, k in ranks.items() if k}
        r = max(set(kept.values()), key=lambda k: (list(kept.values()).count(k), k))
        probe = self.probe()
        power = 0.5 if probe.rank_stabilized else 1.0
        s = (probe.alpha or 2.0 * probe.r) / probe.r**power
        others = {name: k for name, k in kept.items() if k != r}
        drop = {"r", "alpha", "out", "exclude_modules"}
        values: dict[str, Any] = {k: v for k, v in self.given.items() if k not in drop}
        gone = [name for name, k in ranks.items() if not k]
        values |= {
            "r": r,
            "alpha": s * r**power,
            "rank_pattern": others,
            "alpha_pattern": {name: s * k**power for name, k in others.items()},
            "exclude_modules": [*probe.exclude_modules, *gone],
            "out": str(self.out / "advised"),
        }
        return make_config(values, "The advised configuration")
