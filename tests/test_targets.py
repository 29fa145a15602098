"""Targets: names, suffixes, patterns, all-linear, layers, excludes and what mistakes are told."""

import time

import pytest
import torch
from torch import nn

from rankwise.errors import UserError
from rankwise.layers import Spec, wrap
from rankwise.targets import (
    find_head,
    first_match,
    layer_index,
    matches,
    select,
    shared_weights,
    sites,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.key = nn.Linear(4, 4)
        self.value = nn.Linear(4, 4)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(4)
        self.feed = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.my_query = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 2)


def names(*patterns: str, **options) -> list[str]:
    return [site.name for site in select(Model(), patterns, **options)]


# --- the language of names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("query", "query", True),
        ("query", "a.b.query", True),
        ("query", "a.my_query", False),  # an end after a dot, not the end of a word
        ("query", "a.query.dense", False),
        ("b.query", "a.b.query", True),
        ("b.query", "a.bb.query", False),
        ("a.b", "axb", False),  # a dot in a plain name is a dot
        (r".*\.query", "a.query", True),
        (r".*\.query", "a.query.dense", False),  # the whole name, not its beginning
        (r"query|value", "a.query", False),
        (r".*\.(query|value)", "a.value", True),
        (r"layers\.[01]\..*", "layers.1.norm", True),
        (r"layers\.[01]\..*", "layers.2.norm", False),
    ],
)
def test_a_pattern_means_a_name(pattern: str, name: str, expected: bool):
    assert matches(pattern, name) is expected


def test_the_first_pattern_that_matches_counts():
    assert first_match(["key", r".*\.query", "query"], "a.query") == r".*\.query"
    assert first_match(["key"], "a.query") is None


@pytest.mark.parametrize("pattern", ["(", "[a", "*query", "a{2", "a\\", "(?P<x>", "+"])
def test_a_malformed_expression_is_named(pattern: str):
    if pattern == "a{2":  # an unclosed brace is a brace, in re as in regex
        assert not matches(pattern, "query")
        return
    with pytest.raises(UserError, match="is not a regular expression"):
        matches(pattern, "query")


def test_an_expression_nested_beyond_reason_is_refused():
    with pytest.raises(UserError, match="nested too deeply"):
        matches("(" * 5000 + ")" * 5000, "query")


def test_a_catastrophic_expression_ends_within_its_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rankwise.targets.patterns.PATTERN_SECONDS", 0.2)
    pattern = r"((\w)|(\w\w)|\.)*(?<!y)"  # takes minutes on this name
    began = time.monotonic()
    with pytest.raises(UserError, match=r"took over 0\.2 s on the name"):
        matches(pattern, "encoder.layer.0.attention.self.attention.output.projection.query")
    assert time.monotonic() - began < 5


def test_the_layer_of_a_name_is_its_first_number():
    assert layer_index("encoder.layer.11.attention.0.query") == 11
    assert layer_index("encoder.layer1.query") is None


# --- select --------------------------------------------------------------------------------------


def test_an_exact_name_means_one_module():
    assert names("layers.1.attention.query") == ["layers.1.attention.query"]


def test_a_suffix_means_every_module_that_ends_so_in_the_models_order():
    assert names("value", "query") == [
        "layers.0.attention.query",
        "layers.0.attention.value",
        "layers.1.attention.query",
        "layers.1.attention.value",
        "layers.2.attention.query",
        "layers.2.attention.value",
    ]


def test_an_expression_must_match_the_whole_name():
    assert names(r"layers\.[02]\.attention\.(query|key)") == [
        "layers.0.attention.query",
        "layers.0.attention.key",
        "layers.2.attention.query",
        "layers.2.attention.key",
    ]


def test_an_expression_passes_over_containers():
    assert names(r"layers\.0\.(attention|attention\.query)") == ["layers.0.attention.query"]
    assert names(r"layers\.0\.feed(\..*)?") == ["layers.0.feed.0", "layers.0.feed.2"]


def test_targets_that_overlap_mean_a_module_once():
    assert names("my_query", "my_query", r"my_.*") == ["my_query"]


def test_excludes_win_and_cover_what_lies_inside():
    assert names("query", exclude_modules=["layers.0", r"layers\.2\..*"]) == [
        "layers.1.attention.query"
    ]


def test_layers_narrow_the_targets():
    assert names("query", layers=[2, 0]) == ["layers.0.attention.query", "layers.2.attention.query"]


def test_all_linear_is_every_linear_but_the_head():
    expected = [
        f"layers.{i}.{part}"
        for i in range(3)
        for part in ("attention.query", "attention.key", "attention.value", "feed.0", "feed.2")
    ]
    assert names("all-linear") == [*expected, "my_query"]


def test_all_linear_may_be_joined_by_names():
    assert {"tokens", "classifier"} <= set(names("all-linear", "tokens", "classifier"))


# --- mistakes ------------------------------------------------------------------------------------


def refused(*patterns: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        names(*patterns, **options)
    return str(caught.value)


def test_an_unmatched_target_is_an_error_with_the_nearest_names():
    message = refused("query", "vlaue")
    assert "target_modules: 'vlaue' matches no module. Did you mean 'value'" in message
    assert "tokens, query, key, value" in message
    assert "'query'" not in message.partition("Did you mean")[0]  # what matches is not blamed


def test_a_match_that_is_excluded_is_no_typo():
    assert "takes away every module" in refused("query", exclude_modules=["query"])


def test_an_unmatched_exclude_is_an_error():
    assert "exclude_modules: 'quary' matches no module. Did you mean 'query'" in refused(
        "query", exclude_modules=["quary"]
    )


def test_every_problem_is_said_at_once():
    message = refused("qeury", r".*\.nope", "norm", exclude_modules=["nothing"], layers=[7])
    for part in ("'qeury'", r"'.*\.nope'", "'layers.0.norm'", "'nothing'", "layers: 7"):
        assert part in message


def test_a_module_that_cannot_be_adapted_is_refused_by_name_and_by_expression():
    assert "LayerNorm is not one of Linear" in refused("norm")
    assert "LayerNorm is not one of Linear" in refused(r".*\.norm")
    assert "ModuleList is not one of" in refused("layers")


def test_layers_that_are_not_there_are_named_with_those_that_are():
    message = refused("query", layers=[1, 3, 12])
    assert "layers: 3, 12 name no block" in message
    assert "0 to 2" in message
    assert "none" in refused("my_query", layers=[0])


def test_empty_lists_are_refused():
    assert "target_modules is empty" in refused()
    assert "layers: the list is empty" in refused("query", layers=[])


# --- places and shared weights -------------------------------------------------------------------


class Twice(nn.Module):
    """One module under two names, inside one block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Layer()
        self.second = self.first
        self.lone = nn.Linear(4, 4)
        self.first.again = self.first.feed[0]


def test_a_shared_module_is_one_site_with_every_place():
    model = Twice()
    table = sites(model)
    assert "second.feed.0" not in table
    assert "first.again" not in table or "first.feed.0" not in table
    site = sites(model)[select(model, ["feed.0"])[0].site.name]
    assert [(type(parent), attribute) for parent, attribute in site.owners()] == [
        (nn.Sequential, "0"),
        (Layer, "again"),
    ]
    new = nn.Linear(4, 8)
    site.put(new)
    assert model.first.feed[0] is model.second.again is new
    assert [type(m) for m in model.first.feed] == [nn.Linear, nn.ReLU, nn.Linear]  # order kept


def test_sites_stop_at_an_adapted_layer():
    model = Model()
    model.my_query = wrap(model.my_query, Spec(2, 4.0))  # type: ignore[assignment]
    assert "my_query" in sites(model)
    assert "my_query.base_layer" not in sites(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.other = nn.Linear(4, 6, bias=False)


def test_tied_weights_are_told_by_storage():
    model = Tied()
    assert shared_weights(model) == []
    model.out.weight = model.tokens.weight
    model.other.weight = nn.Parameter(model.tokens.weight.data)  # another object, one storage
    assert shared_weights(model) == [("tokens.weight", "out.weight", "other.weight")]


def test_tied_weights_are_told_on_the_meta_device_too():
    with torch.device("meta"):
        model = Tied()
        assert shared_weights(model) == []
        model.out.weight = model.tokens.weight
    assert shared_weights(model) == [("tokens.weight", "out.weight")]


# --- the head of any module ----------------------------------------------------------------------


def test_the_head_of_a_plain_model_is_its_last_linear_outside_the_blocks():
    head = find_head(Model())
    assert (head.names, head.kind) == (("classifier",), "output")
    assert find_head(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))).names == ("2",)


def test_a_model_without_an_output_layer_has_no_head():
    assert find_head(nn.Sequential(nn.LayerNorm(3))).names == ()
    assert find_head(nn.TransformerEncoderLayer(4, 2, 8)).names == ()
    assert find_head(Layer()).names == ("feed.2",)


def test_an_adapted_head_is_still_the_head():
    model = Model()
    model.classifier = wrap(model.classifier, Spec(2, 4.0))  # type: ignore[assignment]
    assert find_head(model).names == ("classifier",)


def test_a_head_holds_itself_and_what_lies_inside():
    head = find_head(Model())
    assert head.holds("classifier")
    assert head.holds("classifier.dense")
    assert not head.holds("classifiers")


def test_a_parameter_of_the_model_itself_is_refused_with_the_remedy():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = nn.Parameter(torch.zeros(2, 3, 3))
            self.out = nn.Linear(3, 3)

    with pytest.raises(UserError, match=r"'bank' is a parameter of the model itself.*of its own"):
        select(Bare(), ["bank"])
