"""Names under PEFT's rules: compared with PEFT's own matching, and named exactly."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from rankwise.errors import ArtifactError
from rankwise.io.peft_names import Rule, entries, exact, patterns, saved_entries, value_for
from rankwise.targets import matches

NAMES = [
    *("embed", "fc", "head", "lm_head", "score", "blocks", "a-b.fc"),
    *(f"blocks.{i}.{part}" for i in range(12) for part in ("fc", "attn", "attn.q", "attn.v")),
    *("encoder.layers.1.blocks.3.fc", "x.score.fc"),
]


def peft_targets(rule: Rule, name: str) -> bool:
    target = rule.target_modules
    config = SimpleNamespace(
        target_modules=target if isinstance(target, str) else set(target),
        exclude_modules=rule.exclude_modules,
        modules_to_save=rule.modules_to_save,
        layers_to_transform=rule.layers,
        layers_pattern=list(rule.layers_pattern),
    )
    found = check_target_module_exists(config, name)
    return bool(found) and "Excluded" not in type(found).__name__


RULES = [
    Rule(("fc",)),
    Rule(("fc", "attn.q")),
    Rule(("blocks.1.fc",)),
    Rule(r".*\.(q|v)"),
    Rule(r"fc|blocks\.1\d\.fc"),
    Rule(("fc", "q"), exclude_modules=("blocks.1.fc", "attn.q")),
    Rule(("fc", "q"), exclude_modules=r".*\.1\..*"),
    Rule(("fc", "head"), modules_to_save=("score", "head")),
    Rule(("fc",), layers=(1, 3)),
    Rule(("fc", "blocks.5.attn.q"), layers=(3,), layers_pattern=("blocks",)),
    Rule(("fc",), layers=(1,), layers_pattern=("layers", "blocks")),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_means_what_peft_says_it_means(rule: Rule):
    assert [n for n in NAMES if rule.targets(n)] == [n for n in NAMES if peft_targets(rule, n)]
    assert any(rule.targets(n) for n in NAMES)


@pytest.mark.parametrize(
    "keys", [{"fc": 1}, {"1.fc": 2, "fc": 3}, {"^fc": 4}, {r"blocks\.\d.*": 5}]
)
def test_a_pattern_gives_what_peft_gives(keys: dict[str, int]):
    for name in NAMES:
        assert value_for(keys, name, 9) == keys.get(get_pattern_key(keys.keys(), name), 9)


PARTS = st.sampled_from(["a", "b", "fc", "1", "12", "q+", "x[0]", "fc_", "q|v"])
MODELS = st.lists(st.lists(PARTS, min_size=1, max_size=3).map(".".join), min_size=1, unique=True)


@settings(max_examples=40)
@given(MODELS, st.data())
def test_the_entries_mean_exactly_the_wanted_modules(names: list[str], data: st.DataObject):
    wanted = data.draw(st.sets(st.sampled_from(names), min_size=1))
    rule = Rule(entries(wanted, names))
    assert {n for n in names if rule.targets(n)} == wanted
    assert {n for n in names if peft_targets(rule, n)} == wanted


@settings(max_examples=40)
@given(st.dictionaries(MODELS.map(lambda m: m[0]), st.integers(1, 4), min_size=1))
def test_the_patterns_give_each_module_its_own_value(values: dict[str, int]):
    default, keys = patterns(values)
    peft = {n: keys.get(get_pattern_key(keys.keys(), n), default) for n in values}
    assert peft == values
    assert {n: value_for(keys, n, default) for n in values} == values


@settings(max_examples=40)
@given(MODELS, st.data())
def test_an_exact_name_means_one_module_to_rankwise(names: list[str], data: st.DataObject):
    name = data.draw(st.sampled_from(names))
    assert [n for n in names if matches(exact([name], names)[name], n)] == [name]


def test_names_are_as_short_as_they_can_be():
    every = [n for n in NAMES if n.endswith(".q")]
    assert entries(every, NAMES) == ("q",)
    assert entries(["blocks.1.fc", "blocks.2.attn.q"], NAMES) == ("1.fc", "2.attn.q")
    alone = entries(["fc"], NAMES)
    assert isinstance(alone, str)
    assert [n for n in NAMES if re.fullmatch(alone, n)] == ["fc"]
    assert patterns({"blocks.1.fc": 8, "fc": 8, "blocks.2.fc": 4}) == (8, {"2.fc": 4})
    assert patterns({"blocks.1.fc": 8, "blocks.2.fc": 8, "fc": 4}) == (8, {"^fc": 4})


def test_a_module_trained_whole_is_named_apart_where_that_is_possible():
    assert saved_entries(["score"], NAMES) == ("score",)
    assert saved_entries(["lm_head"], NAMES) == ("lm_head",)
    assert saved_entries(["blocks.3.attn"], NAMES) == ("3.attn",)
    assert saved_entries(["head"], NAMES) == ("head",)  # lm_head too, and no end tells them apart
    assert Rule((), modules_to_save=("head",)).saves("lm_head")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(fc", "'.fc' is not a regular expression"),
        ("(" * 5000 + ")" * 5000, "is nested too deeply"),
        (r"((\w)|(\w\w)|\.)*(?<!y)", r"took over 0\.2 s on the name"),
    ],
)
def test_an_expression_from_a_file_is_not_trusted(monkeypatch, pattern: str, message: str):
    monkeypatch.setattr("rankwise.io.peft_names.PATTERN_SECONDS", 0.2)
    with pytest.raises(ArtifactError, match=message):
        Rule(pattern).targets("encoder.layer.0.attention.self.attention.output.projection.query")
