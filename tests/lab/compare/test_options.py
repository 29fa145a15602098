"""The options of a comparison: checked at once, and grown only where they may."""

from pathlib import Path

import pytest

from rankwise.errors import UserError
from rankwise.lab.compare.options import METHODS, SHARED, CompareConfig, make_compare, merge
from rankwise.train.config import FitConfig, make_config


def test_by_default_everything_is_compared():
    config = make_compare({}, "here")
    assert config.methods == list(METHODS)
    assert (config.ranks, config.seeds, config.rates) == ([1, 2, 4, 8, 16, 32], 3, 3)


def test_text_is_read_as_flags_are():
    config = make_compare({"methods": "lora, head", "ranks": "8,1-2,8", "seeds": "4"}, "here")
    assert (config.methods, config.ranks, config.seeds) == (["head", "lora"], [1, 2, 8], 4)


def test_all_that_is_wrong_is_said():
    with pytest.raises(UserError) as caught:
        make_compare({"methods": "lora,bitfitt", "rates": 4, "ranks": [0]}, "The options")
    for words in (
        "'bitfitt' is none of",
        "Did you mean 'bitfit'",
        "--rates must be odd",
        "--ranks",
    ):
        assert words in str(caught.value)
    with pytest.raises(UserError, match="--seeds should be greater than or equal to 1, got 0"):
        make_compare({"seeds": 0}, "The options")
    with pytest.raises(UserError, match="at least one rank"):
        make_compare({"ranks": []}, "The options")
    with pytest.raises(UserError, match="at least one method"):
        make_compare({"methods": []}, "The options")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_fit(name: str):
    config = make_config({**METHODS[name], "model": "m", "data": "d", "out": "o"}, "test")
    assert config.method == METHODS[name]["method"]


def test_what_the_grid_sets_cannot_be_given():
    assert not {"method", "r", "alpha", "lr", "seed", "out", "select"} & set(SHARED)
    assert {"model", "data", "epochs", "target_modules", "limit"} <= set(SHARED)
    assert not set(SHARED) & set(CompareConfig.model_fields)
    assert set(SHARED) <= set(FitConfig.model_fields)


def test_methods_ranks_and_seeds_may_grow():
    stored = {"methods": ["lora"], "ranks": [1, 2], "seeds": 3, "rates": 3, "reference": None}
    given = {"methods": ["head"], "ranks": [2, 4], "seeds": 5, "reference": "head"}
    assert merge(stored, given, Path("x")) == {
        "methods": ["lora", "head"],
        "ranks": [1, 2, 2, 4],
        "seeds": 5,
        "rates": 3,
        "reference": "head",
    }
    assert merge(stored, {"seeds": 1}, Path("x"))["seeds"] == 3


def test_nothing_else_may_change():
    with pytest.raises(UserError) as caught:
        merge({"rates": 3, "epochs": 1.0}, {"rates": 5, "epochs": 2.0}, Path("x"))
    assert "--rates was 3 and is now 5." in str(caught.value)
    assert "--epochs was 1.0 and is now 2.0." in str(caught.value)
    assert merge({"rates": 3}, {"rates": 3}, Path("x")) == {"rates": 3}
