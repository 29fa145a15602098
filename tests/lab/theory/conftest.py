"""A small theory that was really run, and a whole one whose numbers are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.lab.theory import Bound, Cell, Inputs, Samples, Theory, TheoryRecord, run_theory
from rankwise.lab.theory.experiments import OPTIMIZERS, RULES, scaling_ranks

SMALL = Theory(
    *(8, 6, 400),
    rows=(12, 96),
    draws=3,
    width=4,
    scaling_steps=40,
    scaling_draws=2,
)


@pytest.fixture(scope="session")
def small() -> Theory:
    """Options of a theory that takes seconds."""
    return SMALL


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, small: Theory) -> Path:
    """The folder of the small theory, for tests that only read it."""
    made = tmp_path_factory.mktemp("theory") / "made" / "here"
    run_theory(made, small)
    return made


@pytest.fixture(scope="session")
def measured_record(folder: Path) -> TheoryRecord:
    """What the small theory measured."""
    from rankwise.lab.theory.records import read_record

    return read_record(folder / "records.json")


def made_up(theory: Theory) -> TheoryRecord:
    """A complete record in which everything holds, without training anything."""
    top = theory.ranks[-1]
    bounds = [
        Bound(name, r, max(1 - r / top, 1e-9) * 1.001, 1 - r / top, 1e-6)
        for r in theory.ranks
        for name in ("exact rank", "flat")
    ]
    inputs = [
        Inputs(r, b * 1.002, b, b * (2 if b else 1), b * 1.5, b * 1.5, b)
        for r in theory.ranks
        for b in [1 - r / top]
    ]
    samples = [
        Samples(rows, r, 1 - r / top, *2 * (tuple(1 - r / top + r / rows + d for d in (0, 1e-3)),))
        for r in theory.ranks
        for rows in theory.rows
    ]
    cells = [
        Cell(optimizer, rule, r, scale(r), rate, None if place > 9 else 0.9 ** (place * 3))
        for optimizer, (_, rates) in OPTIMIZERS.items()
        for rule, scale in RULES.items()
        for r in scaling_ranks(theory)
        for place, rate in enumerate(rates)
    ]
    versions = {"python": "3.11.9", "torch": "2.13.0"}
    return TheoryRecord(
        theory,
        *(tuple(bounds), tuple(inputs), tuple(samples), tuple(cells)),
        seconds=31.5,
        code={"version": "0.1.0", "commit": "abc1234"},
        versions=versions,
        hardware={"cpu": "Some CPU", "cores": 2},
    )


@pytest.fixture(scope="session")
def made_record(small: Theory) -> TheoryRecord:
    """A record in which everything holds."""
    return made_up(small)


@pytest.fixture(scope="session")
def whole_record() -> TheoryRecord:
    """The same at the size that `rankwise theory` has by default."""
    return made_up(Theory())
