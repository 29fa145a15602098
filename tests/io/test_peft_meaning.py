"""What a configuration means on a model, and what it cannot mean."""

from typing import Any

import pytest
from torch import nn

from peft_models import Convolutions, Flat, Heads, Mixture, Twins, gpt2, llama, make, tied
from rankwise.errors import ArtifactError
from rankwise.io.peft_config import PeftConfig
from rankwise.io.peft_layout import Notes, Share
from rankwise.io.peft_meaning import Meaning, meaning
from rankwise.io.peft_names import Rule
from rankwise.layers import Split


def meant(model: nn.Module, *targets: str, notes: Notes | None = None, **options: Any) -> Meaning:
    rule = Rule(targets, modules_to_save=options.pop("saved", ()))
    config = PeftConfig(rule, 2, 4.0, {}, {}, **options)
    return meaning(config, notes or Notes(), model, None)


def test_a_module_means_itself_and_an_attention_its_parts():
    found = meant(make(Heads), "first", "head")
    parts = [f"first.{p}_proj" for p in ("q", "k", "v", "out")]
    assert list(found.targets) == [*parts, "head"]
    assert [form.target for form in found.forms] == ["first", "head"]
    assert found.problems == ()


def test_our_notes_tell_which_parts_there_are():
    share = Share(2, 4.0, (0, 2))
    notes = Notes(
        shares={"h.0.a.k": share, "transformer.h.0.attn.c_attn.q": share},
        split={"transformer.h.0.attn.c_attn": Split(("q", "k", "v"))},
    )
    found = meant(make(gpt2), "0.attn.c_attn", notes=notes)
    assert list(found.targets) == ["transformer.h.0.attn.c_attn.q"]
    with pytest.raises(ArtifactError, match="parts of its fused projections do not fit"):
        meant(make(Flat), "up", notes=Notes(split={"up": Split(("a", "b"), (1, 2))}))


def test_parameters_are_meant_by_their_ends():
    found = meant(make(Mixture), parameters=("experts.up", "router.weight"))
    assert list(found.targets) == ["router", "blocks.0.experts.up", "blocks.1.experts.up"]
    assert [form.target for form in found.forms] == [
        "router.weight",
        "blocks.0.experts.up",
        "blocks.1.experts.up",
    ]
    (problem,) = meant(make(Mixture), parameters=("experts.up", "experts.upp")).problems
    assert "'experts.upp' means no parameter. Did you mean" in problem


def test_tied_layers_share_the_update_of_the_embedding():
    found = meant(make(tied), "lm_head", tied=True)
    assert found.tied == {"lm_head": "model.embed_tokens"}
    assert [form.target for form in found.forms] == ["model.embed_tokens", "lm_head"]
    assert meant(make(tied), "q_proj", tied=True).tied == {}
    assert meant(make(tied), "lm_head").tied == {}
    (problem,) = meant(make(llama), "embed_tokens", tied=True).problems
    assert "no layer tied to its input embedding" in problem
    assert (
        "each of the tied layers" in meant(make(tied), "lm_head", tied=True, dora=True).problems[0]
    )


def test_what_is_tied_to_a_trained_embedding_trains_with_it():
    found = meant(make(tied), "q_proj", saved=("embed_tokens",), tied=True)
    assert found.whole == ("model.embed_tokens", "lm_head")
    assert meant(make(tied), "q_proj", saved=("embed_tokens",)).whole == ("model.embed_tokens",)


def test_rows_are_those_of_embeddings():
    assert meant(make(tied), "q_proj", tokens={None: (3,)}).tokens == {"model.embed_tokens": (3,)}
    both = meant(make(tied), "q_proj", tokens={"embed_tokens": (3,), "lm_head": (3,)})
    assert list(both.tokens) == ["model.embed_tokens"]
    other = meant(make(tied), "q_proj", tokens={"embed_tokens": (3,), "lm_head": (4,)})
    assert "'lm_head' train by themselves" in other.problems[0]
    assert (
        "row 99 of 'embed' trained" in meant(make(Flat), "up", tokens={"embed": (99,)}).problems[0]
    )
    assert "'embd' means no module" in meant(make(Flat), "up", tokens={"embd": (1,)}).problems[0]
    twins = meant(make(Twins), "a", tokens={"embed": (1,)})
    assert "'out' holds the weight of 'embed', and PEFT" in twins.problems[0]


CANNOT = {
    "nothing": (Flat, ("nope",), {}, "target_modules means no module of this model"),
    "a norm": (Flat, ("up", "norm"), {}, "'norm' cannot be adapted: LayerNorm is not one of"),
    "a list": (Mixture, ("blocks",), {}, "'blocks' cannot be adapted"),
    "dora of groups": (Convolutions, ("two",), {"dora": True}, "PEFT has no DoRA for 'two'"),
    "dora of attention": (Heads, ("first",), {"dora": True}, "PEFT has no DoRA for 'first.q_proj'"),
    "dora of a bank": (Mixture, (), {"dora": True, "parameters": ("up",)}, "PEFT has no DoRA for"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_is_told(case: str):
    build, targets, options, message = CANNOT[case]
    assert message in meant(make(build), *targets, **options).problems[0]


def test_a_layer_in_two_places_is_one_that_peft_adapts_in_one():
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleDict({"c": layer})})
    (problem,) = meant(model, "a").problems
    assert "'a' hangs in 2 places of this model (a, b.c), of which PEFT adapts the first" in problem
    assert meant(model, "a", by_rankwise=True).problems == ()


def test_an_attention_of_other_sizes_is_another_base():
    model = nn.ModuleDict({"m": nn.MultiheadAttention(4, 2, kdim=2)})
    assert "'m' keeps query, key and value in matrices" in meant(model, "m").problems[0]
