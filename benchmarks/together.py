"""Runs of `rankwise fit` at several ranks trained together, beside the same one after the other.

    python -m benchmarks.together [--runs 6] [--rows 500] [--rounds 3] [--threads 2] [--device auto]

MiniLM on the demo's data, r = 1, 2, 4, ..., one epoch, one evaluation. The two ways take turns;
a ratio below 1 means that together they take less. Training counts the steps alone; a run also
loads, evaluates and saves. The losses of both ways are compared. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from benchmarks.speed.timing import Ratio, alternate, ratio
from transformers import logging

from rankwise.data.pydocs import docstrings
from rankwise.lab.demo import model_folder
from rankwise.train.config import FitConfig, make_config
from rankwise.train.loop import Diverged
from rankwise.train.run import FitResult, fit
from rankwise.train.setup import Data
from rankwise.train.together import fit_together

__all__ = ["Grid"]

TOGETHER, APART = "together", "one after the other"
HELD = 240


class Grid:
    """So many runs that differ in r, and what each way of training them took and came to."""

    def __init__(self, model: str, runs: int, rows: int, device: str) -> None:
        self.data = Data(*docstrings(0, rows, HELD))
        self.model, self.runs, self.device = model, runs, device
        self.training: dict[str, list[float]] = {TOGETHER: [], APART: []}
        self.losses: dict[str, list[float]] = {}

    def together(self) -> None:
        """Train all in one go."""
        made: list[FitResult] = []

        def ended(_: FitConfig, result: FitResult | Diverged) -> None:
            assert isinstance(result, FitResult)
            made.append(result)

        with tempfile.TemporaryDirectory() as folder:
            fit_together(self._configs(Path(folder)), ended, data=self.data)
        self._note(TOGETHER, made)

    def apart(self) -> None:
        """Train one after the other."""
        with tempfile.TemporaryDirectory() as folder:
            made = [fit(config, data=self.data) for config in self._configs(Path(folder))]
        self._note(APART, made)

    def _configs(self, folder: Path) -> list[FitConfig]:
        shared = {"model": self.model, "data": "memory", "device": self.device}
        shared |= {"metric": "accuracy", "epochs": 1, "select": "last"}
        return [
            make_config({**shared, "r": 2**i, "out": str(folder / f"{i}")}, "benchmark")
            for i in range(self.runs)
        ]

    def _note(self, way: str, made: list[FitResult]) -> None:
        self.training[way].append(sum(run.manifest["seconds"]["train"] for run in made))
        self.losses[way] = [run.manifest["metrics"]["loss"] for run in made]

    @property
    def apart_by(self) -> float:
        """The largest relative difference between the losses of the two ways."""
        pairs = zip(self.losses[TOGETHER], self.losses[APART], strict=True)
        return max(abs(one - other) / other for one, other in pairs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("runs", 6), ("rows", 500), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    grid = Grid(str(model_folder()), given.runs, given.rows, given.device)
    seconds = alternate({TOGETHER: grid.together, APART: grid.apart}, given.rounds)
    training = {way: found[1:] for way, found in grid.training.items()}  # the first is warming up
    about = f"{given.threads} threads, torch {torch.__version__}"
    print(f"{given.runs} runs of {given.rows} rows, {about}")
    print("\n| what | together, s | together / one after the other (95 %) |\n|---|--:|--:|")
    for what, found in (("training steps", training), ("whole runs", seconds)):
        by: Ratio = ratio(found[TOGETHER], found[APART])
        middle = sorted(found[TOGETHER])[len(found[TOGETHER]) // 2]
        print(f"| {what} | {middle:.1f} | {by.value:.2f} ({by.low:.2f}-{by.high:.2f}) |")
    print(f"\nLosses of the evaluations at most {grid.apart_by:.1e} apart.")


if __name__ == "__main__":
    main()
