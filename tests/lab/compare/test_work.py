"""What is left to do follows from what is done, and from nothing else."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from rankwise.lab.compare.grid import Grid
from rankwise.lab.compare.options import make_compare
from rankwise.lab.compare.tuning import Outcome, Settled
from rankwise.lab.compare.work import work_of

ROWS = {"train": 100, "search-train": 80}
SHARED = {"model": "m", "task": "classification", "metric": "accuracy", "epochs": 1.0}


def grid(**options) -> Grid:
    given = {"methods": "head,lora", "ranks": "1,2", "seeds": 2, **options}
    return Grid(Path("out"), make_compare(given, "test"), SHARED, ROWS)


def score(name: str) -> Outcome:
    """Best at 3e-3 in a search; the runs themselves do not matter."""
    rate = float(name.partition("-lr")[2].partition("-seed")[0])
    return Outcome(-abs(math.log(rate / 3e-3)), 1.0)


def names(cells) -> list[str]:
    return [cell.name for cell in cells]


SEARCHES = (
    ("head", (1e-3, 3e-3, 1e-2)),
    ("lora-r1", (3e-4, 1e-3, 3e-3)),
    ("lora-r2", (3e-4, 1e-3, 3e-3)),
)


def test_searches_come_first():
    work = work_of(grid(search_head=False), {}, "accuracy")
    assert names(work.cells) == [
        f"search/{key}-lr{rate:g}" for key, rates in SEARCHES for rate in rates
    ]
    assert work.settled == {}
    assert work.count == 9 + 6
    assert work.expected > sum(cell.cost for cell in work.cells)


def test_the_heads_search_comes_before_the_others():
    first = work_of(grid(), {}, "accuracy")
    assert names(first.cells) == [f"search/head-lr{rate:g}" for rate in SEARCHES[0][1]]
    assert first.count == 9 + 6  # what waits is in the count, and in the time that is left
    assert first.expected == work_of(grid(search_head=False), {}, "accuracy").expected
    done = {name: score(name) for name in names(first.cells)}
    assert f"search/lora-r1-lr{1e-3:g}" in names(work_of(grid(), done, "accuracy").cells)


def test_every_other_method_learns_its_head_at_a_good_rate_of_the_head_alone():
    # 0.01 is the best, 0.003 nearly as good: the first for the head alone, the second beside others
    scores = {1e-3: 0.5, 3e-3: 0.695, 1e-2: 0.7, 3e-2: 0.6}
    heads = {f"search/head-lr{rate:g}": Outcome(value, 1.0) for rate, value in scores.items()}
    made, done = grid(methods="head,full,lora", ranks="2"), {}
    while left := work_of(made, done, "accuracy").left(done):
        name = left[0].name
        done[name] = heads[name] if name in heads else score(name)
    work = work_of(made, done, "accuracy")
    assert "runs/head-lr0.01-seed0" in names(work.cells)
    assert work.head_rate == 3e-3
    for cell in work.cells:
        head = cell.config.method == "head"
        assert cell.config.head_lr == (None if head else 3e-3), cell.name
    assert {cell.config.method for cell in work.cells} == {"head", "full", "lora"}


def test_a_head_that_is_not_compared_is_searched_for_the_others_alone():
    made, done = grid(methods="lora", ranks="2"), {}
    while left := work_of(made, done, "accuracy").left(done):
        done[left[0].name] = score(left[0].name)
    assert [name for name in done if name.startswith("search/head")]
    assert not [name for name in done if name.startswith("runs/head")]


def test_head_only_alone_has_its_search_once():
    assert not grid(methods="head").head_first
    assert names(work_of(grid(methods="head"), {}, "accuracy").cells)[0] == "search/head-lr0.001"


def test_a_head_that_never_trains_leaves_the_others_their_own_rate():
    done = {f"search/head-lr{rate:g}": Outcome(math.nan, math.nan) for rate in SEARCHES[0][1]}
    work = work_of(grid(widen=0), done, "accuracy")
    others = [cell for cell in work.cells if cell.name not in done]
    assert others
    assert {cell.config.head_lr for cell in others} == {None}


@pytest.mark.parametrize(
    ("shared", "options"),
    [
        ({"head_lr": 0.02}, {}),  # given, so there is nothing to search
        ({"task": "causal-lm"}, {}),  # the output layer stays as it is
        ({"head": "freeze"}, {}),
        ({}, {"search_head": False}),
        ({}, {"rates": 1}),  # no search of anything
    ],
)
def test_where_the_head_is_not_searched_first(shared, options):
    made = replace(grid(**options), shared={**SHARED, **shared})
    assert not made.head_first
    work = work_of(made, {}, "accuracy")
    assert any(cell.config.method == "lora" for cell in work.cells)
    assert {cell.config.head_lr for cell in work.cells} == {shared.get("head_lr")}


def test_a_search_that_is_over_sets_its_runs_free():
    done = {f"search/head-lr{rate:g}": score(f"head-lr{rate:g}") for rate in (1e-3, 3e-3, 1e-2)}
    work = work_of(grid(), done, "accuracy")
    assert work.settled == {"head": Settled(3e-3)}
    assert {"runs/head-lr0.003-seed0", "runs/head-lr0.003-seed1"} <= set(names(work.cells))
    assert not {*names(work.left(done))} & set(done)


@pytest.mark.parametrize("pick", [0, -1])
def test_the_grid_comes_to_an_end_in_any_order(pick):
    made, done = grid(), {}
    while left := work_of(made, done, "accuracy").left(done):
        done[left[pick].name] = score(left[pick].name)
    assert sorted(done) == sorted(
        [
            *(f"search/head-lr{rate:g}" for rate in (1e-3, 3e-3, 1e-2)),
            # one further, as the best was at the edge
            *(f"search/lora-r{r}-lr{rate:g}" for r in (1, 2) for rate in (3e-4, 1e-3, 3e-3, 1e-2)),
            *(f"runs/{k}-lr0.003-seed{s}" for k in ("head", "lora-r1", "lora-r2") for s in (0, 1)),
        ]
    )
    work = work_of(made, done, "accuracy")
    assert work.count == len(done)
    assert work.expected == sum(cell.cost for cell in work.cells)


def test_a_shared_search_serves_every_rank():
    made, done = grid(search_rank=2), {}
    while left := work_of(made, done, "accuracy").left(done):
        done[left[0].name] = score(left[0].name)
    assert not [name for name in done if name.startswith("search/lora-r1")]
    assert {f"runs/lora-r{r}-lr0.003-seed0" for r in (1, 2)} <= set(done)


def test_without_a_search_the_defaults_are_taken():
    work = work_of(grid(rates=1), {}, "accuracy")
    assert names(work.cells) == [
        f"runs/{setting}-seed{seed}"
        for seed in (0, 1)  # an early end leaves whole seeds
        for setting in ("head-lr0.005", "lora-r1-lr0.001", "lora-r2-lr0.001")
    ]


def test_a_method_that_never_trains_has_no_runs():
    made, done = grid(methods="head"), {}
    while left := work_of(made, done, "accuracy").left(done):
        done[left[0].name] = Outcome(math.nan, math.nan)
    assert all(name.startswith("search/") for name in done)
    assert work_of(made, done, "accuracy").settled["head"].rate is None


def test_more_seeds_and_ranks_leave_what_is_done():
    made, done = grid(), {}
    while left := work_of(made, done, "accuracy").left(done):
        done[left[0].name] = score(left[0].name)
    grown = grid(seeds=3, ranks="1,2,4")
    new = names(work_of(grown, done, "accuracy").left(done))
    assert "runs/head-lr0.003-seed2" in new
    assert "search/lora-r4-lr0.001" in new
    assert not set(new) & set(done)
