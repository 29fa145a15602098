"""Tasks with a planted rank: the search finds it, for every rank and seed, noise or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from planted import OUT, RANKS, SEEDS, R, learned, planted
from rankwise.lab.advising import bootstrap
from rankwise.lab.advising.choosing import Judge, Probe, grown, search
from rankwise.lab.advising.records import EVERY_LAYER, PER_LAYER, Trial, smallest
from rankwise.lowrank import Factors
from rankwise.spectrum import Layer, Spectrum, Top, spectrum
from rankwise.train.answers import Answers
from rankwise.train.trying import Quality

ROWS = 64


def quality(losses: Tensor) -> Quality:
    n = len(losses)
    answers = Answers(np.arange(n), losses.double().numpy(), np.ones(n, dtype=np.int64))
    return Quality({"loss": float(answers.losses.mean())}, answers)


class Task:
    """Layers side by side: what is left of each one's target, added up, is the loss of a row."""

    def __init__(self, parts: list[tuple[Tensor, Tensor, Factors]], r: int = R) -> None:
        self.r = r
        self.parts = {f"layer.{i}": part for i, part in enumerate(parts)}
        self.whole = {name: f.truncate(min(r, OUT)) for name, (_, _, f) in self.parts.items()}
        self.layers = {
            name: Layer(spectrum(f), f.count() // f.r) for name, (_, _, f) in self.parts.items()
        }

    def tried(self, ranks: Mapping[str, int]) -> Quality:
        total = torch.zeros(ROWS)
        for name, (x, y, _) in self.parts.items():
            A, B = self.whole[name].A[: ranks[name]], self.whole[name].B[:, : ranks[name]]
            total = total + (y - x @ A.T @ B.T).square().sum(dim=1)
        return quality(total)

    def probe(self) -> Probe:
        whole = self.tried(dict.fromkeys(self.parts, self.r))
        judge = Judge("loss", whole, self.tried(dict.fromkeys(self.parts, 0)))
        return Probe(self.r, self.layers, judge)

    def trials(self, kinds: Iterable[str] = (EVERY_LAYER, PER_LAYER)) -> list[Trial]:
        probe = self.probe()
        assert probe.judge.gained
        found: list[Trial] = []
        for trial in search(self.layers, self.r, probe.judge, self.tried):
            if trial.kind not in kinds:
                break
            found.append(trial)
        return found


def tasks(
    ranks: list[tuple[int, int]], noise: float, r: int = R
) -> list[tuple[Tensor, Tensor, Factors]]:
    """For each rank and seed: rows that nothing was trained on, and what gradients learned."""
    made = [planted(k, seed, noise) for k, seed in ranks]
    own = [(x[ROWS:], y[ROWS:]) for x, y in made]
    A, B = learned(*(torch.stack(parts) for parts in zip(*own, strict=True)), r=r)
    return [
        (x[:ROWS], y[:ROWS], Factors(a, b, 1.0)) for (x, y), a, b in zip(made, A, B, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_planted_rank_is_the_smallest_that_is_enough(
    noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS", 200)
    pairs = [(k, seed) for k in RANKS for seed in SEEDS]
    wrong: list[tuple[int, int, int | None]] = []
    for (k, seed), part in zip(pairs, tasks(pairs, noise), strict=True):
        found = smallest(Task([part]).trials([EVERY_LAYER]))
        if found is None or found.size != k:
            wrong.append((k, seed, None if found is None else found.size))
    assert wrong == []


@pytest.mark.parametrize("seed", range(5))
def test_layers_of_different_rank_get_each_its_own(seed: int) -> None:
    planted_ranks = [2, 7, 1]
    task = Task(tasks([(k, seed) for k in planted_ranks], 0.1))
    trials = task.trials()
    same = smallest([t for t in trials if t.kind == EVERY_LAYER])
    own = smallest([t for t in trials if t.kind == PER_LAYER])
    assert same is not None
    assert own is not None
    assert same.size == 7
    assert list(own.ranks.values()) == planted_ranks
    assert own.parameters < same.parameters


@pytest.mark.parametrize(
    ("k", "opened", "stays"),
    [(3, [8], 8), (4, [8], 8), (6, [8, 16], 8), (8, [8, 16], 8), (12, [8, 16, 32], 16)],
)
def test_a_probe_grows_until_it_has_ranks_to_spare(k: int, opened: list[int], stays: int) -> None:
    made: dict[int, Task] = {}

    def of(r: int) -> Probe:
        made[r] = Task(tasks([(k, 0)], 0.1, r), r)
        return made[r].probe()

    found = grown([8, 16, 32, 64], of, lambda probe: tuple(made[probe.r].trials()))
    assert list(made) == opened
    assert found.probe.r == stays
    assert [(s.r, s.larger) for s in found.steps] == list(pairwise(opened))
    assert [s.enough for s in found.steps] == [s.r == stays for s in found.steps]
    same = smallest([t for t in found.trials if t.kind == EVERY_LAYER])
    assert same is not None
    assert same.size == k


def test_a_probe_that_gains_nothing_does_not_grow() -> None:
    task = Task(tasks([(3, 0)], 0.1))
    same = task.tried({"layer.0": 0})
    nothing = Probe(R, task.layers, Judge("loss", same, same))
    found = grown([R, 2 * R], {R: nothing}.__getitem__, lambda _: ())
    assert (found.probe, found.trials, found.steps) == (nothing, (), ())


def test_a_loss_that_is_sure_but_tiny_counts_as_none() -> None:
    draw = np.random.default_rng(0)
    rows = torch.from_numpy(draw.normal(5, 1, ROWS))
    judge = Judge("loss", quality(rows), quality(rows + 1))
    cut = Top(1).allocate({"a": Layer(Spectrum((1.0, 0.5)), 1)})
    tiny, real = (judge.trial(EVERY_LAYER, 1, cut, quality(rows + more)) for more in (0.009, 0.02))
    assert tiny.low > 0
    assert tiny.enough
    assert not real.enough


def test_a_loss_that_matters_is_not_excused_by_few_rows() -> None:
    draw = np.random.default_rng(0)
    rows = torch.from_numpy(draw.normal(5, 1, ROWS))
    cut = Top(1).allocate({"a": Layer(Spectrum((1.0, 0.5)), 1)})
    spread = torch.from_numpy(draw.normal(0, 1, ROWS))
    spread = spread - spread.mean()

    def enough(lost: float, gain: float) -> bool:
        judge = Judge("loss", quality(rows), quality(rows + gain))
        trial = judge.trial(EVERY_LAYER, 1, cut, quality(rows + spread + lost))
        assert trial.low < 0 < trial.high  # never sure
        return trial.enough

    assert enough(0.04, 1.0)
    assert not enough(0.06, 1.0)
    assert enough(0.06, 2.0)
    assert enough(0.06, 0.0)  # where nothing was gained, there is no share of it


def test_a_loss_that_comes_back_is_not_hidden_by_a_score() -> None:
    """A cut that answers every row as the probe does, with a loss that is higher."""
    draw = np.random.default_rng(0)
    rows, labels = draw.normal(5, 1, ROWS), draw.integers(0, 2, ROWS).astype(float)

    def answered(losses: np.ndarray, predictions: np.ndarray) -> Quality:
        ones = np.ones(ROWS, dtype=np.int64)
        answers = Answers(np.arange(ROWS), losses, ones, labels, predictions, 2)
        right = float((predictions == labels).mean())
        return Quality({"accuracy": right, "loss": float(losses.mean())}, answers)

    judge = Judge("accuracy", answered(rows, labels), answered(rows + 1, 1 - labels))
    cut = Top(1).allocate({"a": Layer(Spectrum((1.0, 0.5)), 1)})
    little, much = (
        judge.trial(EVERY_LAYER, 1, cut, answered(rows + more, labels)) for more in (0.04, 0.06)
    )
    assert (little.lost, much.lost) == (0, 0)
    assert (little.loss_back, much.loss_back) == pytest.approx((0.04, 0.06))
    assert little.enough
    assert not much.enough


def test_a_small_cut_is_not_believed_where_a_larger_one_fails() -> None:
    def trial(size: int, enough: bool) -> Trial:
        return Trial(
            kind=EVERY_LAYER,
            size=size,
            ranks={"a": size},
            parameters=10 * size,
            error=0,
            score=0,
            lost=0,
            low=0,
            high=0,
            loss_back=0,
            enough=enough,
        )

    found = smallest([trial(1, True), trial(2, False), trial(4, True), trial(8, True)])
    assert found is not None
    assert found.size == 4
    assert smallest([trial(8, False)]) is None
