import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.train.config import _MEANT_FOR, FitConfig, make_config, refuse_idle
from rankwise.train.config_file import dump_config

NEEDED = {"model": "m", "data": "d.tsv", "out": "o"}


def made(**more: Any) -> FitConfig:
    return make_config(NEEDED | more, "here")


def refused(**more: Any) -> str:
    with pytest.raises(UserError) as caught:
        made(**more)
    return str(caught.value)


def test_a_typo_names_the_nearest_option() -> None:
    message = refused(learning_rat=1e-4, targetmodules="query")
    assert "'learning_rat' is no option" in message
    assert "'targetmodules' is no option. Did you mean 'target_modules'" in message
    assert message.startswith("here:")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        make_config({"model": "m", "out": "o", "r": 0, "dropout": 1.5, "seed": "x"}, "here")
    message = str(caught.value)
    for flag in ("--data", "--r)", "--dropout", "--seed"):
        assert flag in message
    assert "Training rows" in message  # what the missing option is for


def test_a_wrong_word_names_the_nearest_word() -> None:
    assert "Did you mean 'bfloat16'" in refused(dtype="bf16")
    assert "Did you mean 'lora'" in refused(method="loar")


def test_text_that_reads_as_a_number_is_one() -> None:
    # YAML 1.1 reads 1e-4 as text
    assert yaml.safe_load("1e-4") == "1e-4"
    config = made(lr="1e-4", epochs="2", batch_size="16")
    assert (config.lr, config.epochs, config.batch_size) == (1e-4, 2.0, 16)


@pytest.mark.parametrize("value", ["nan", math.nan, math.inf, "-inf", 0, -1e-3, "fast"])
def test_a_rate_is_a_finite_number_above_zero(value: object) -> None:
    assert "(--lr)" in refused(lr=value)


@pytest.mark.parametrize("name", ["epochs", "weight_decay", "warmup", "save_minutes", "alpha"])
def test_no_option_takes_nan(name: str) -> None:
    assert f"(--{name.replace('_', '-')})" in refused(**{name: math.nan})


def test_lists_and_mappings_may_be_written_as_text() -> None:
    config = made(
        target_modules=r"query, value, encoder\.layer\.(1|2),x{1,2}",
        exclude_modules=["a", "b"],
        layers="0-2,5",
        rank_pattern="query=4, layer\\.1=2",
        alpha_pattern={"value": "8"},
    )
    assert config.target_modules == ["query", "value", r"encoder\.layer\.(1|2)", "x{1,2}"]
    assert config.exclude_modules == ["a", "b"]
    assert config.layers == [0, 1, 2, 5]
    assert config.rank_pattern == {"query": 4, "layer\\.1": 2}
    assert config.alpha_pattern == {"value": 8.0}


def test_lists_and_mappings_that_are_not() -> None:
    assert "neither a number nor a range" in refused(layers="3-1")
    assert "neither a number nor a range" in refused(layers="first")
    assert "name=number" in refused(rank_pattern="query")
    assert "(--rank-pattern)" in refused(rank_pattern="query=many").replace("['query']", "")


def test_the_rate_of_each_method_unless_one_is_given() -> None:
    rates = {m: made(method=m).learning_rate for m in ("lora", "head", "full")}
    assert rates == {"lora": 1e-3, "head": 5e-3, "full": 5e-5}
    assert made(method="full", lr=0.5).learning_rate == 0.5


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        made().r = 4  # type: ignore[misc]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1)
NAMES = st.lists(st.from_regex(r"[a-z][a-z.\\*0-9]{0,8}", fullmatch=True), max_size=3)


@given(
    st.fixed_dictionaries(
        {"model": TEXT, "data": TEXT, "out": TEXT},
        optional={
            "lr": st.floats(1e-12, 1e3),
            "alpha": st.floats(1e-3, 1e30),
            "epochs": st.floats(0.01, 100),
            "target_modules": NAMES,
            "exclude_modules": NAMES,
            "layers": st.lists(st.integers(0, 99)),
            "rank_pattern": st.dictionaries(TEXT, st.integers(1, 64), max_size=2),
            "alpha_pattern": st.dictionaries(TEXT, st.floats(0.1, 99), max_size=2),
            "text_column": TEXT,
            "seed": st.integers(0, 2**32 - 1),
            "group_by_length": st.booleans(),
        },
    )
)
def test_what_is_dumped_is_read_back(values: dict[str, Any]) -> None:
    config = make_config(values, "here")
    text = dump_config(config)
    assert make_config(yaml.safe_load(text), "there") == config
    assert all(f"{name}:" in text for name in FitConfig.model_fields)


def test_defaults_that_follow_from_other_options_are_filled_in() -> None:
    assert (made().lr, made().alpha) == (1e-3, 16.0)
    assert (made(r=4, lr=0.5).lr, made(r=4).alpha, made(alpha=3).alpha) == (0.5, 8.0, 3.0)
    assert (made(method="head").lr, made(method="head").alpha) == (5e-3, None)
    assert [made(method=m).base_dropout for m in ("full", "lora", "head")] == [True, False, False]
    assert made(base_dropout=True).base_dropout
    assert not made(method="full", base_dropout=False).base_dropout
    assert made(task="regression").metric == "pearson"
    assert made(task="causal-lm", metric="loss").metric == "loss"
    text = dump_config(made(task="classification"))
    assert "lr: 0.001\n" in text
    assert "alpha: 16\n" in text
    assert "metric: accuracy\n" in text


def test_the_rate_of_the_output_layer_is_a_share_of_the_others() -> None:
    assert made().head_ratio == 1.0
    assert made(head_lr=0.02).head_ratio == pytest.approx(20.0)
    assert made(head_lr=0.02, lr=0.1).head_ratio == pytest.approx(0.2)
    assert made(method="head", head_lr=0.02).head_ratio == 1.0


def test_what_is_not_known_yet_stays_open() -> None:
    """The task follows from the data, and with a rank pattern α is 2·r of each layer."""
    assert made().metric is None
    assert made(rank_pattern="query=4").alpha is None


@pytest.mark.parametrize(
    ("method", "idle", "fine"),
    [
        ("bitfit", ["r", "dora", "target_modules"], ["head", "modules_to_save", "lr"]),
        ("lora", ["prefix_length", "adapter_size"], ["layers", "bias", "lora_plus"]),
        ("bottleneck", ["alpha"], ["target_modules", "adapter_placement"]),
        ("full", ["head", "modules_to_save"], ["epochs"]),
        ("head", ["head", "head_lr"], ["modules_to_save"]),
    ],
)
def test_options_of_another_method_are_refused(
    method: str, idle: list[str], fine: list[str]
) -> None:
    refuse_idle(fine, method)
    for name in idle:
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} means nothing to it"):
            refuse_idle([name, *fine], method)


def test_every_option_of_the_methods_is_known_to_the_list() -> None:
    """An option of the group Method is one of some methods, but for the method itself."""
    own = {
        name
        for name, field in FitConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict)
        and field.json_schema_extra["group"] == "Method"
    }
    assert own - {"method"} <= set(_MEANT_FOR)
    assert set(_MEANT_FOR) <= set(FitConfig.model_fields)
