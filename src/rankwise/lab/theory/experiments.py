"""The experiments: every rank against its bounds, and every scaling over ranks and rates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch

from rankwise.lab.theory.problems import (
    Matrix,
    Problem,
    best_update,
    excess,
    sample,
    slanted,
    spectra,
    tail,
    teacher,
)
from rankwise.lab.theory.records import Bound, Cell, Inputs, Samples, Theory, TheoryRecord
from rankwise.lab.theory.training import Adam, Descent, Method, start, train
from rankwise.lowrank import scaling

__all__ = ["MEETING", "OPTIMIZERS", "RULES", "Job", "Rows", "jobs", "scaling_ranks"]

Rows = dict[str, list[Bound] | list[Inputs] | list[Samples] | list[Cell]]
"""New rows of a record, by the name of their table."""

SETTLING = Adam(beta2=0.95)
"""How every rank is trained to rest. β2 = 0.95 forgets large gradients within some twenty steps, so
that the small singular values get steps of full size as soon as the large ones are learned."""
SETTLING_RATE = 0.05

MEETING = 8
"""The rank at which the three scalings agree: s = 2."""
RULES: dict[str, Callable[[int], float]] = {
    "fixed α": lambda r: scaling(r, 2.0 * MEETING),
    "α = 2r": lambda r: scaling(r, 2.0 * r),
    "α/√r": lambda r: scaling(r, 2.0 * math.sqrt(MEETING), rank_stabilized=True),
}
OPTIMIZERS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "gradient descent": (Descent(), tuple(2.0**k for k in range(-10, 4))),
    "Adam": (Adam(), tuple(2.0**k for k in range(-13, 1))),
}
"""Each optimiser with the learning rates it is tried at."""


@dataclass(frozen=True)
class Job:
    """A piece of the work: what it costs beside the others, and how its rows are made."""

    name: str
    cost: int
    run: Callable[[], Rows]


def jobs(record: TheoryRecord) -> Iterator[Job]:
    """The work that is still to be done for a record, piece by piece."""
    theory = record.theory
    told = {row.r for row in record.bounds}
    for r in theory.ranks:
        if r not in told:
            cost = theory.steps * (12 + r)
            yield Job(f"rank {r}", cost, functools.partial(_rank, theory, r))
    done = {(cell.optimizer, cell.rule, cell.r) for cell in record.scaling}
    for optimizer in OPTIMIZERS:
        for rule in RULES:
            for r in scaling_ranks(theory):
                if (optimizer, rule, r) not in done:
                    run = functools.partial(_scaling, theory, optimizer, rule, r)
                    yield Job(f"{optimizer}, {rule}", theory.scaling_steps * (12 + 2 * r), run)


def scaling_ranks(theory: Theory) -> list[int]:
    """The ranks at which scalings are tried: powers of two up to the layer's width."""
    return [2**k for k in range(theory.width.bit_length()) if 2**k <= theory.width]


# Every rank against its bounds


@dataclass(frozen=True)
class _Bank:
    """The problems that are trained together at each rank."""

    white: tuple[Problem, ...]
    slanted: Problem
    truth: Problem
    sampled: tuple[tuple[int, Problem], ...]

    @property
    def every(self) -> list[Problem]:
        return [*self.white, self.slanted, *(problem for _, problem in self.sampled)]


@functools.lru_cache(maxsize=1)
def _bank(theory: Theory) -> _Bank:
    random = np.random.default_rng(theory.seed)
    kinds = spectra(min(theory.outputs, theory.inputs))
    size = theory.outputs, theory.inputs, random
    white = tuple(teacher(name, values, *size) for name, values in kinds.items())
    root = slanted(theory.inputs, theory.ratio, random)
    truth = teacher("samples", kinds["exponential"], *size)
    drawn = tuple(
        (rows, sample(truth, rows, theory.noise, random))
        for rows in theory.rows
        for _ in range(theory.draws)
    )
    return _Bank(white, teacher("inputs", kinds["power law"], *size, root), truth, drawn)


def _rank(theory: Theory, r: int) -> Rows:
    """Train every problem of the bank at rank r, and set each beside its bounds."""
    bank = _bank(theory)
    every = bank.every
    begun = start(
        len(every), theory.outputs, theory.inputs, r, scaling(r, 2.0 * r), theory.seed + r
    )
    done = train(every, begun, SETTLING, SETTLING_RATE, theory.steps, settle=True)
    updates = done.factors.delta().numpy()
    bounds = [
        Bound(p.name, r, excess(p, update)[1], tail(p.delta)[r], float(gradient))
        for p, update, gradient in zip(bank.white, updates, done.gradient, strict=False)
    ]
    place = len(bank.white)
    learned = excess(bank.slanted, updates[place])
    regression = excess(bank.slanted, best_update(bank.slanted, r))
    plain = excess(bank.slanted, _truncated(bank.slanted, r))
    inputs = Inputs(
        r,
        loss=learned[0],
        loss_bound=tail(bank.slanted.wanted)[r],
        loss_of_svd=plain[0],
        error=learned[1],
        error_of_regression=regression[1],
        error_bound=tail(bank.slanted.delta)[r],
    )
    samples = _samples(bank, r, list(updates[place + 1 :]))
    return {"bounds": bounds, "inputs": [inputs], "samples": samples}


def _truncated(problem: Problem, r: int) -> Matrix:
    """The r largest singular values of Δ*, which knows nothing of the inputs."""
    u, values, vt = np.linalg.svd(problem.delta, full_matrices=False)
    return (u[:, :r] * values[:r]) @ vt[:r]


def _samples(bank: _Bank, r: int, updates: Sequence[Matrix]) -> list[Samples]:
    floor = tail(bank.truth.delta)[r]
    errors: dict[int, list[tuple[float, float]]] = {}
    for (rows, problem), update in zip(bank.sampled, updates, strict=True):
        closed = best_update(problem, r)
        pair = excess(bank.truth, update)[1], excess(bank.truth, closed)[1]
        errors.setdefault(rows, []).append(pair)
    return [
        Samples(rows, r, floor, tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
        for rows, pairs in errors.items()
    ]


# Every scaling over ranks and rates


def _scaling(theory: Theory, optimizer: str, rule: str, r: int) -> Rows:
    """Train at every rate under one scaling, towards a teacher of rank 1.

    A Δ* of rank 1 can be learned at every rank, so that what differs is the optimisation alone.
    """
    method, rates = OPTIMIZERS[optimizer]
    scale, size = RULES[rule](r), theory.width
    random = np.random.default_rng(theory.seed)
    drawn = [
        teacher("scaling", np.ones(1), size, size, random) for _ in range(theory.scaling_draws)
    ]
    every = [problem for problem in drawn for _ in rates]
    begun = start(len(drawn), size, size, r, scale, theory.seed + r)
    begun = replace(
        begun,
        A=begun.A.repeat_interleave(len(rates), 0),
        B=begun.B.repeat_interleave(len(rates), 0),
    )
    each = torch.tensor(rates, dtype=torch.float64).repeat(len(drawn))
    done = train(every, begun, method, each, theory.scaling_steps, settle=False)
    gaps = [excess(p, u)[1] for p, u in zip(every, done.factors.delta().numpy(), strict=True)]
    cells: list[Cell] = []
    for place, rate in enumerate(rates):
        mine = gaps[place :: len(rates)]
        fine = all(math.isfinite(gap) and gap <= 1 for gap in mine)
        cells.append(Cell(optimizer, rule, r, scale, rate, fmean(mine) if fine else None))
    return {"scaling": cells}
