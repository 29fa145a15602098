"""The records of a comparison read back, and its report as a function of them alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import ArtifactError, UserError
from rankwise.lab import words
from rankwise.lab.compare.folder import Pinned
from rankwise.lab.compare.grid import Cell, Grid
from rankwise.lab.compare.searching import Found, searching
from rankwise.lab.compare.tuning import Outcome
from rankwise.lab.compare.work import work_of
from rankwise.lab.compare.worker import SPECTRA
from rankwise.lab.energy import Spectra
from rankwise.lab.findings import findings
from rankwise.lab.records import RunRecord, in_order, read_run
from rankwise.lab.report import summary_table, write_report
from rankwise.lab.settings import group_runs
from rankwise.train.manifest import NAME as MANIFEST
from rankwise.train.manifest import read_manifest

__all__ = ["NUMBERS", "REPORT", "Evidence", "outcome_of", "outcomes_of", "read_evidence"]

REPORT = "report.html"
NUMBERS = "csv"


@dataclass(frozen=True)
class Evidence:
    """What a comparison has shown.

    Attributes:
        pinned: what it holds to.
        runs: every run that is compared, from the fewest trained parameters up.
        searches: every search for a learning rate, in the order of the methods.
        head_rate: learning rate of the output layer in all but head-only, where it has its own.
        reference: the label of what the others are compared with; None for the usual one, also
            where the one that was named has no usable runs.
        spectra: singular values of the update that LoRA learned at the largest rank.
        left: how many runs are still to be done, as far as that can be told now.
    """

    pinned: Pinned
    runs: tuple[RunRecord, ...]
    searches: tuple[Found, ...]
    head_rate: float | None
    reference: str | None
    spectra: Spectra
    left: int

    @property
    def report(self) -> Path:
        """Where the report is."""
        return self.pinned.folder / REPORT

    def summary(self) -> str:
        """The table and what was found, as text for a terminal."""
        said = findings(self.runs, self.spectra, self.reference)
        said = [*said, *self._unmet()]
        lines = [summary_table(self.runs), "", *(f"- {sentence}" for sentence in said)]
        if self.left:
            lines += ["", f"Not finished: {words.count(self.left, 'run')} to go."]
        return "\n".join(lines)

    def write(self) -> Path:
        """Write report.html and csv/; the same records give the same bytes."""
        title = f"Methods and ranks compared: {self.pinned.about}"
        if self.left:
            title += f" (not finished: {words.count(self.left, 'run')} to go)"
        return write_report(
            self.report,
            title=title,
            runs=self.runs,
            reference=self.reference,
            spectra=self.spectra,
            sections=[searching(self.searches, self.pinned, self.head_rate)],
            notes=[*self.pinned.notes, *self._unmet()],
            numbers=self.pinned.folder / NUMBERS,
        )

    def _unmet(self) -> list[str]:
        """What there is to say where the reference that was named cannot be used."""
        named = self.pinned.config.reference
        if named is None or self.reference is not None:
            return []
        said = (
            f"Not every run of the reference that was named, {named}, has come to a score; the "
            "usual reference stands in its place."
        )
        return [said]


def read_evidence(pinned: Pinned) -> Evidence:
    """The evidence in a comparison's folder: that of the runs and searches that are over.

    Raises:
        UserError: no run is over yet, or they began from bases of different weights.
        ArtifactError: a record is damaged.
    """
    grid = pinned.grid
    outcomes = outcomes_of(grid, pinned.metric)
    work = work_of(grid, outcomes, pinned.metric)
    over = [cell for cell in work.cells if cell.name in outcomes]
    runs = in_order(read_run(grid.folder / c.name) for c in over if c.name.startswith("runs/"))
    if not runs:
        raise UserError(f"No run of the comparison in '{grid.folder}' is finished yet.")
    _refuse_other_bases(runs)
    searches: list[Found] = []
    for key, settled in work.settled.items():
        cells = [cell for cell in over if cell.name.startswith(f"search/{key}-lr")]
        tried = [(cell.config.learning_rate, read_run(grid.folder / cell.name)) for cell in cells]
        if tried:
            searches.append(Found(key, tuple(tried), settled))
    return Evidence(
        pinned,
        tuple(runs),
        tuple(searches),
        work.head_rate,
        _reference(runs, pinned.config.reference),
        _spectra(runs),
        work.count - len(outcomes),
    )


def _refuse_other_bases(runs: list[RunRecord]) -> None:
    """Runs stand beside each other where they began from the same weights."""
    bases = {run.base["fingerprint"]: run for run in runs}
    if len(bases) > 1:
        names = " and ".join(f"'{run.folder}'" for run in list(bases.values())[:2])
        raise UserError(
            f"{names} began from different weights of {runs[0].config['model']}, so they cannot be "
            "compared. Put back the model of one, and move the runs of the other away."
        )


def outcomes_of(grid: Grid, metric: str) -> dict[str, Outcome]:
    """What the runs that the grid needs have come to, by their names, as their folders say."""
    outcomes: dict[str, Outcome] = {}
    while True:
        new = {
            cell.name: found
            for cell in work_of(grid, outcomes, metric).left(outcomes)
            if (found := outcome_of(grid.folder / cell.name, cell, metric)) is not None
        }
        if not new:
            return outcomes
        outcomes |= new


def outcome_of(folder: Path, cell: Cell, metric: str) -> Outcome | None:
    """What a run folder has come to; None where its run is not over.

    Raises:
        UserError: the folder holds a run of other options.
        ArtifactError: its manifest is damaged.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    _refuse_other(folder, manifest["config"], cell)
    if manifest.get("diverged"):
        return Outcome(math.nan, math.nan)
    if manifest["status"] != "finished":
        return None
    numbers = {k: math.nan if v is None else v for k, v in manifest["metrics"].items()}
    return Outcome(numbers[metric], numbers["loss"])


def _refuse_other(folder: Path, stored: Mapping[str, object], cell: Cell) -> None:
    """A cell is its options; where its folder lies, and on which device it ran, is not of them."""
    wanted = cell.config.model_dump(mode="json")
    apart = [
        name
        for name, value in wanted.items()
        if name in stored
        and stored[name] != value
        and name not in ("out", "data", "eval", "device")
    ]
    if apart:
        raise UserError(
            f"'{folder}' holds a run with another {', '.join(apart)} than the comparison asks "
            "for. Name another --out, or move the folder away."
        )


def _reference(runs: list[RunRecord], key: str | None) -> str | None:
    """The label of the setting whose runs lie in folders of this key, where all are usable."""
    if key is None:
        return None
    for setting in group_runs(runs):
        mine = any(run.folder.name.startswith(f"{key}-lr") for run in setting.runs)
        if mine and setting.usable:
            return setting.label
    return None


def _spectra(runs: list[RunRecord]) -> Spectra:
    """Singular values of the updates of the usable LoRA run of the largest rank."""
    lora = [run for run in runs if run.rank is not None and run.usable]
    if not lora:
        return {}
    most = max(run.rank or 0 for run in lora)
    path = next(run for run in lora if run.rank == most).folder / SPECTRA
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' is damaged: {error}. Delete it.") from error
