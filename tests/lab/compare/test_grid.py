"""The grid: every setting once, every run a whole configuration, each with a name of its own."""

from pathlib import Path

from rankwise.lab.compare.grid import Grid
from rankwise.lab.compare.options import make_compare

ROWS = {"train": 100, "search-train": 80}
SHARED = {
    "model": "m",
    "task": "classification",
    "metric": "accuracy",
    "epochs": 2.0,
    "batch_size": 8,
    "target_modules": ["query"],
    "dropout": 0.1,
    "dtype": "bfloat16",
}


def grid(**options) -> Grid:
    return Grid(Path("out"), make_compare(options, "test"), SHARED, ROWS)


def test_all_regimes_are_there():
    keys = [regime.key for regime in grid().regimes()]
    assert keys == [
        *("full", "head", "bitfit", "bottleneck-houlsby", "bottleneck-pfeiffer", "prefix"),
        *(f"lora-r{r}" for r in (1, 2, 4, 8, 16, 32)),
        *(f"lora-r{r}-a16" for r in (1, 2, 4, 16, 32)),  # at r = 8 both rules are one
    ]


def test_every_rank_has_its_own_search_or_all_have_one():
    own = grid(methods="head,lora", ranks="1,4")
    assert {r.key: r.search for r in own.regimes()} == {
        "head": "head",
        "lora-r1": "lora-r1",
        "lora-r4": "lora-r4",
    }
    shared = grid(methods="head,lora,lora-fixed-alpha", ranks="1,4", search_rank=2)
    assert set(shared.searches()) == {"head", "lora-r2", "lora-r2-a16"}
    assert {r.key: r.search for r in shared.regimes()} == {
        "head": "head",
        "lora-r1": "lora-r2",
        "lora-r4": "lora-r2",
        "lora-r1-a16": "lora-r2-a16",
        "lora-r4-a16": "lora-r2-a16",
    }


def test_a_cell_is_a_whole_configuration():
    made = grid()
    regime = next(r for r in made.regimes() if r.key == "lora-r4-a16")
    cell = made.run_cell(regime, 3e-3, 2)
    config = cell.config
    assert cell.name == "runs/lora-r4-a16-lr0.003-seed2"
    assert (config.method, config.r, config.alpha, config.lr, config.seed) == (
        "lora",
        4,
        16,
        3e-3,
        2,
    )
    assert (config.data, config.eval) == ("out/data/train.jsonl", "out/data/eval.jsonl")
    assert (config.out, config.select) == (f"out/{cell.name}", "last")
    assert (config.target_modules, config.dropout, config.dtype) == (["query"], 0.1, "bfloat16")


def test_a_search_runs_on_its_own_rows():
    cell = grid().search_cell("head", 1e-2)
    assert cell.name == "search/head-lr0.01"
    assert cell.config.data == "out/data/search-train.jsonl"
    assert cell.config.eval == "out/data/search-eval.jsonl"
    assert cell.config.seed == 0


def test_a_search_may_be_shorter_than_the_runs():
    made = grid(search_epochs=0.5)
    assert made.search_cell("head", 1e-2).config.epochs == 0.5
    assert made.run_cell(made.regimes()[0], 1e-2, 0).config.epochs == 2
    assert made.search_cell("head", 1e-2).cost == 5  # half an epoch of 80 rows in batches of 8


def test_what_is_of_lora_alone_is_given_to_lora_alone():
    made = grid()
    for regime in made.regimes():
        config = made.run_cell(regime, 1e-3, 0).config
        lora = config.method == "lora"
        assert config.target_modules == (["query"] if lora else None)
        assert config.dropout == (0.1 if lora else 0.0)
        assert config.dtype == ("float32" if config.method == "full" else "bfloat16")


def test_runs_of_one_setting_differ_in_their_seed_alone():
    made = grid()
    one, two = (made.run_cell(made.regimes()[0], 1e-3, seed).config.model_dump() for seed in (0, 1))
    assert {k for k in one if one[k] != two[k]} == {"seed", "out"}


def test_no_two_cells_share_a_name():
    made = grid()
    cells = [made.run_cell(r, 1e-3, s) for r in made.regimes() for s in range(3)]
    cells += [made.search_cell(key, rate) for key in made.searches() for rate in (1e-3, 3e-3)]
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({cell.config.out for cell in cells}) == len(cells)


def test_the_cost_is_in_passes():
    made = grid()
    costs = {r.key: made.run_cell(r, 1e-3, 0).cost for r in made.regimes()}
    batches = 2 * 13  # epochs of 100 rows in batches of 8
    assert (costs["head"], costs["lora-r1"], costs["full"]) == (batches, 2 * batches, 3 * batches)
    short = Grid(Path("out"), made.config, {**SHARED, "max_steps": 3, "accumulate": 2}, ROWS)
    assert short.run_cell(short.regimes()[1], 1e-3, 0).cost == 6


def test_searches_begin_at_the_default_of_a_fit():
    made = grid()
    assert made.centre("full") == 5e-5
    assert made.centre("lora-r1") == 1e-3
