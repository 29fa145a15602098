"""The grid: which settings are compared, and each of their runs as the configuration of a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.lab.compare.options import LORA_ONLY, METHODS, CompareConfig
from rankwise.lab.compare.rows import rows_file
from rankwise.train.config import LEARNING_RATES, FitConfig, make_config

__all__ = ["HEAD", "Cell", "Grid", "Regime"]

HEAD = "head"
"""The method that trains the output layer alone."""

# Forward, backward through the activations, backward to the weights: what each method computes.
_PASSES = {"head": 1, "full": 3}


@dataclass(frozen=True)
class Regime:
    """One setting: a method, for LoRA at one rank and α.

    Attributes:
        key: its name in the names of folders.
        options: what it asks of a run.
        search: the key of the search that finds its learning rate, its own or one it shares.
    """

    key: str
    options: Mapping[str, Any]
    search: str


@dataclass(frozen=True)
class Cell:
    """One run of the grid: its place below the comparison's folder, its options, and its cost."""

    name: str
    config: FitConfig
    cost: int


@dataclass(frozen=True)
class Grid:
    """Everything that is to be run.

    Attributes:
        folder: of the comparison.
        config: what is compared.
        shared: the options of fit that every run has, bar those of LoRA alone for the others.
        rows: training rows of the runs and of the searches.
        head_rate: learning rate of the output layer, where it has one of its own.
    """

    folder: Path
    config: CompareConfig
    shared: Mapping[str, Any]
    rows: Mapping[str, int]
    head_rate: float | None = None

    @property
    def head_first(self) -> bool:
        """Whether the search of the head comes first and gives its rate to all others."""
        wanted = self.config.search_head and self.config.rates > 1
        given = self.shared.get("head_lr") is not None
        frozen = self.shared["task"] == "causal-lm" or self.shared.get("head") == "freeze"
        return wanted and not given and not frozen and self.config.methods != [HEAD]

    def regimes(self) -> list[Regime]:
        """The settings in the order of the methods, each once: two rules for α meet in one."""
        found: dict[str, Regime] = {}
        for name in self.config.methods:
            for regime in self._of(name):
                found.setdefault(regime.key, regime)
        return list(found.values())

    def searches(self) -> dict[str, Mapping[str, Any]]:
        """What each search asks of its runs, by the key of the search."""
        found: dict[str, Mapping[str, Any]] = {HEAD: METHODS[HEAD]} if self.head_first else {}
        for name in self.config.methods:
            if METHODS[name]["method"] != "lora":
                found[name] = METHODS[name]
                continue
            for r in [self.config.search_rank] if self.config.search_rank else self.config.ranks:
                key, options = self._lora(name, r)
                found.setdefault(key, options)
        return found

    def centre(self, key: str) -> float:
        """The learning rate around which a search begins: the default of a fit."""
        return LEARNING_RATES[self.searches()[key]["method"]]

    def search_cell(self, key: str, rate: float) -> Cell:
        """A run of a search: on the part of the training rows that is not for tuning."""
        less = {} if self.config.search_epochs is None else {"epochs": self.config.search_epochs}
        options = {**self.searches()[key], **less, "lr": rate, "seed": 0}
        return self._cell(f"search/{key}-lr{rate:g}", "search-train", "search-eval", options)

    def run_cell(self, regime: Regime, rate: float, seed: int) -> Cell:
        """A run that is compared."""
        options = {**regime.options, "lr": rate, "seed": seed}
        return self._cell(f"runs/{regime.key}-lr{rate:g}-seed{seed}", "train", "eval", options)

    def _of(self, name: str) -> list[Regime]:
        if METHODS[name]["method"] != "lora":
            return [Regime(name, METHODS[name], name)]
        found: list[Regime] = []
        for r in self.config.ranks:
            key, options = self._lora(name, r)
            found.append(Regime(key, options, self._lora(name, self.config.search_rank or r)[0]))
        return found

    def _lora(self, name: str, r: int) -> tuple[str, Mapping[str, Any]]:
        """The key and the options of LoRA at one rank, under the rule for α that a name means."""
        usual = self.config.alpha_ratio * r
        alpha = usual if name == "lora" else self.config.alpha_fixed
        key = f"lora-r{r}" + ("" if alpha == usual else f"-a{alpha:g}")
        return key, {"method": "lora", "r": r, "alpha": alpha}

    def _cell(self, name: str, train: str, held: str, options: Mapping[str, Any]) -> Cell:
        """A run on two parts of the rows, with what is asked of it beside what all share."""
        lora = options["method"] == "lora"
        shared = {k: v for k, v in self.shared.items() if lora or k not in LORA_ONLY}
        if options["method"] == "full":
            shared["dtype"] = "float32"  # a base that trains itself takes no other
        if self.head_rate is not None and options["method"] != HEAD:
            shared["head_lr"] = self.head_rate
        own = {
            "data": str(rows_file(self.folder, train)),
            "eval": str(rows_file(self.folder, held)),
            "select": "last",
            "keep_checkpoints": 1,
            "out": str(self.folder / name),
        }
        config = make_config({**shared, **options, **own}, f"The options of {name}")
        return Cell(name, config, self._cost(config, self.rows[train]))

    @staticmethod
    def _cost(config: FitConfig, rows: int) -> int:
        """The passes through the model that a run takes, in batches; to guess the time left."""
        batches = math.ceil(rows / config.batch_size)
        steps = math.ceil(config.epochs * batches)
        if config.max_steps is not None:
            steps = min(steps, config.max_steps * config.accumulate)
        return max(1, steps) * _PASSES.get(config.method, 2)
