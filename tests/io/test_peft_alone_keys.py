"""Every spelling of PEFT's tensor names, and what is left over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise.io.blueprint import blueprint_of
from rankwise.io.peft_alone_keys import Keys, sort_keys

P = "base_model.model."
T = torch.ones(2, 2)


def sort(*keys: str, saved: tuple[str, ...] = (), told: tuple[str, ...] | None = None) -> Keys:
    return sort_keys({key: T + i for i, key in enumerate(keys)}, saved, told)


@pytest.mark.parametrize(
    ("key", "where", "name"),
    [
        ("a.b.lora_A.weight", "sides", "a.b"),
        ("a.b.lora_B.default.weight", "sides", "a.b"),
        ("a._orig_mod.b.lora_A.weight", "sides", "a.b"),
        ("wte.lora_embedding_A", "sides", "wte"),
        ("wte.lora_embedding_B.default", "sides", "wte"),
        ("a.lora_magnitude_vector", "magnitudes", "a"),
        ("a.lora_magnitude_vector.weight", "magnitudes", "a"),
        ("a.lora_magnitude_vector.default.weight", "magnitudes", "a"),
        ("a.lora_B.bias", "b_biases", "a"),
        ("a.lora_B.default.bias", "b_biases", "a"),
    ],
)
def test_each_spelling_is_understood(key: str, where: str, name: str):
    keys = sort(P + key)
    assert name in getattr(keys, where)
    assert not [problem for problem in keys.problems if "no low-rank" not in problem]
    assert (name in keys.embeddings) == ("embedding" in key)


def test_modules_trained_whole_are_told_by_their_ends():
    keys = sort(P + "a.lora_A.weight", P + "x.classifier.dense.weight", saved=("classifier",))
    assert keys.modules == ["x.classifier"]
    assert list(keys.trained) == ["x.classifier.dense.weight"]
    assert keys.problems == []


def test_what_rankwise_told_wins_over_the_ends():
    keys = sort(P + "a.lora_A.weight", P + "lm_head.weight", saved=("head",), told=("head",))
    assert keys.modules == []
    assert list(keys.copies) == ["lm_head.weight"]


def test_copies_of_the_base_are_left_out():
    keys = sort_keys(
        {
            P + "wte.lora_embedding_A": T,
            P + "wte.base_layer.weight": T * 3,
            P + "lm_head.weight": T * 3,  # tied
        },
        (),
        None,
    )
    assert set(keys.copies) == {"wte.base_layer.weight", "lm_head.weight"}
    assert keys.problems == []
    assert keys.notes[-1].startswith("left out: 2 tensors of the base ('wte.base_layer.weight')")


def test_the_base_tells_its_copies():
    model = nn.ModuleDict({"out": nn.Linear(2, 2, bias=False)})
    tensors = {P + "a.lora_A.weight": T, P + "out.weight": model["out"].weight.detach().clone()}
    assert sort_keys(tensors, (), None).needs
    told = sort_keys(tensors, (), None, blueprint_of(model))
    assert (told.problems, told.needs) == ([], [])
    tensors[P + "out.weight"] += 1
    assert sort_keys(tensors, (), None, blueprint_of(model)).problems


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            (P + "a.lora_A.weight", P + "a._orig_mod.lora_A.weight"),
            "occurs twice, in two spellings",
        ),
        ((P + "a.lora_A.x.weight", P + "a.lora_B.y.weight"), "mix several adapters ('x', 'y')"),
        ((P + "a.lora_diag",), "it belongs to KaSA"),
        ((P + "a.lora_magnitude_vector",), "it holds no low-rank factors"),
    ],
)
def test_what_is_left_over_is_told(keys: tuple[str, ...], told: str):
    assert any(told in problem for problem in sort(*keys).problems)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("m.base_layer.out_proj.lora_A.weight", "wrapped twice"),
        ("a.base_layer.bias", "biases are stored as values"),
        ("a.weight", "which --base would tell"),
        ("a.token_adapter.trainable_tokens_delta", "trained rows of an embedding"),
    ],
)
def test_what_others_can_tell_is_no_problem_of_the_file(key: str, told: str):
    keys = sort(P + "q.lora_A.weight", P + key)
    assert (keys.problems, [told in need for need in keys.needs]) == ([], [True])


def test_a_bias_becomes_what_was_added():
    model = nn.ModuleDict({"q": nn.Linear(2, 2)})
    own = model["q"].bias.detach()
    for key in ("q.base_layer.bias", "q.bias"):
        tensors = {P + "q.lora_A.weight": T, P + key: own + 3}
        keys = sort_keys(tensors, (), None, blueprint_of(model))
        torch.testing.assert_close(keys.biases["q.bias"], torch.full((2,), 3.0))
        assert keys.problems == []


def test_a_bias_is_found_under_the_shorter_name_of_the_bases_file():
    inner = nn.Linear(2, 2)
    model = nn.ModuleDict({"layer": nn.ModuleDict({"q": inner})})
    tensors = {P + "bert.layer.q.bias": inner.bias.detach() + 3}
    keys = sort_keys(tensors, (), None, blueprint_of(model))
    torch.testing.assert_close(keys.biases["bert.layer.q.bias"], torch.full((2,), 3.0))


def test_changes_of_names_are_told():
    keys = sort_keys({"module.a.lora_A.weight": T}, (), None)
    assert keys.notes == [
        "names: 'base_model.model.' was not in front of all of them",
        "names: 'module.' of DistributedDataParallel was taken off",
    ]
