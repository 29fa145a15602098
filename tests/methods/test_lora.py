"""LoRA: its values checked, patterns, heads, tied weights, notes, and that it really learns."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import rankwise as rw
from rankwise.attaching import lora_layers
from rankwise.errors import UserError
from rankwise.methods.lora import default_targets

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SMALL)).eval()


def llama(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(num_key_value_heads=2, tie_word_embeddings=tied, **SMALL)
    return LlamaForCausalLM(config).eval()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


def refused(model: nn.Module, **options) -> str:
    with pytest.raises(UserError) as caught:
        rw.attach(model, rw.LoRA(**options))
    return str(caught.value)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"r": 0}, "r must be a whole number"),
        ({"r": 2.0}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"alpha": 0}, "alpha must be a finite number above 0"),
        ({"alpha": -1}, "alpha must be a finite number above 0"),
        ({"alpha": math.nan}, "alpha must be a finite number above 0"),
        ({"alpha": "16"}, "alpha must be a number"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] must be"),
        ({"alpha_pattern": {"query": math.inf}}, r"alpha_pattern\['query'\] must be"),
        ({"dropout": 1.0}, "dropout must be a number of at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"dropout": "0.1"}, "dropout must be"),
        ({"head": "trian"}, "head must be 'train', 'freeze' or None"),
        ({"target_modules": [3]}, "target_modules holds 3, not a name"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(options: dict, word: str):
    with pytest.raises(UserError, match=word):
        rw.LoRA(**options)


def test_all_wrong_values_are_said_at_once():
    with pytest.raises(UserError) as caught:
        rw.LoRA(r=0, alpha=-1, dropout=2, head="x")  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 5


def test_lists_become_tuples_and_one_name_may_stand_alone():
    method = rw.LoRA(target_modules="query", exclude_modules=["a"], layers=[1, 2])
    assert method.target_modules == ("query",)
    assert method.exclude_modules == ("a",)
    assert method.layers == (1, 2)
    assert method == rw.LoRA(target_modules=["query"], exclude_modules=("a",), layers=(1, 2))


def test_alpha_is_twice_the_rank_of_each_layer_unless_given():
    method = rw.LoRA(r=4, rank_pattern={"value": 16})
    assert (method.spec("a.query").alpha, method.spec("a.query").scale) == (8.0, 2.0)
    assert (method.spec("a.value").alpha, method.spec("a.value").scale) == (32.0, 2.0)


def test_patterns_set_rank_and_alpha_and_the_first_match_counts():
    method = rw.LoRA(
        r=8,
        alpha=8,
        rank_pattern={"layer.0.value": 2, "value": 4, r".*\.key": 1},
        alpha_pattern={"key": 3},
    )
    names = ("layer.0.value", "layer.1.value", "layer.0.key", "layer.0.query")
    found = {name: (method.spec(name).r, method.spec(name).alpha) for name in names}
    assert found == {
        "layer.0.value": (2, 8.0),
        "layer.1.value": (4, 8.0),
        "layer.0.key": (1, 3.0),
        "layer.0.query": (8, 8.0),
    }


def test_patterns_reach_the_layers():
    model = bert()
    rw.attach(
        model,
        rw.LoRA(
            r=4,
            alpha=4,
            target_modules=["query", "value"],
            rank_pattern={"value": 2},
            alpha_pattern={r".*layer\.1.*": 12},
            rank_stabilized=True,
        ),
    )
    ends = {n.removeprefix("bert.encoder."): layer for n, layer in lora_layers(model).items()}
    assert {
        n: (layer.update.lora_A.shape[0], round(layer.update.scale, 6)) for n, layer in ends.items()
    } == {
        "layer.0.attention.self.query": (4, 2.0),
        "layer.0.attention.self.value": (2, round(4 / math.sqrt(2), 6)),
        "layer.1.attention.self.query": (4, 6.0),
        "layer.1.attention.self.value": (2, round(12 / math.sqrt(2), 6)),
    }


def test_a_pattern_that_no_adapted_module_has_is_an_error():
    message = refused(
        bert(), target_modules=["query"], rank_pattern={"value": 4}, alpha_pattern={"qeury": 4}
    )
    assert "rank_pattern: 'value' matches no adapted module" in message
    assert "alpha_pattern: 'qeury' matches no adapted module. Did you mean 'query'" in message


# --- targets -------------------------------------------------------------------------------------


def test_without_targets_query_and_value_are_adapted():
    model = bert()
    record = rw.attach(model, rw.LoRA(r=2))
    assert {n.rpartition(".")[2] for n in record.adapted} == {"query", "value"}
    assert len(record.adapted) == 4


def test_a_model_without_known_attention_must_be_told_its_targets():
    with pytest.raises(UserError, match=r"target_modules must be given.*end in: body, out"):
        default_targets(Plain())


def test_a_typo_trains_nothing_and_says_so():
    message = refused(bert(), target_modules=["query", "vlaue"])
    assert "'vlaue' matches no module. Did you mean 'value'?" in message


# --- heads ---------------------------------------------------------------------------------------


def test_a_classification_head_trains_by_default_and_it_is_said():
    model = bert()
    record = rw.attach(model, rw.LoRA(r=2))
    assert list(record.originals) == ["classifier"]
    assert "Trained whole and saved with the adapter: classifier (34 parameters)" in record.notes[0]
    assert model.classifier.weight.requires_grad


def test_a_language_models_output_stays_frozen_by_default():
    model = llama()
    record = rw.attach(model, rw.LoRA(r=2))
    assert not record.originals
    assert not model.lm_head.weight.requires_grad


def test_any_other_models_head_needs_a_word():
    message = refused(Plain(), target_modules=["body"])
    assert "The output layer 'out' would stay as it is" in message
    assert "head='train'" in message
    assert "head='freeze'" in message


@pytest.mark.parametrize(
    ("options", "copied"),
    [
        ({"head": "train"}, ["out"]),
        ({"head": "freeze"}, []),
        ({"modules_to_save": ["out"]}, ["out"]),
        ({"head": "train", "modules_to_save": ["out"]}, ["out"]),
        ({"target_modules": ["body", "out"]}, []),
    ],
)
def test_each_word_about_the_head_is_followed(options: dict, copied: list[str]):
    model = Plain()
    record = rw.attach(model, rw.LoRA(r=2, **{"target_modules": ["body"], **options}))
    assert list(record.originals) == copied
    trains = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("out.")}
    if copied:
        assert trains == {"out.weight", "out.bias"}


def test_a_head_both_trained_whole_and_adapted_is_refused():
    assert "is to be trained whole" in refused(
        Plain(), target_modules=["body", "out"], head="train"
    )


def test_a_head_that_is_not_there_cannot_train():
    body: Any = bert().bert
    assert "has no output layer that Rankwise can find" in refused(body, head="train")


def test_a_typo_in_modules_to_save_is_an_error():
    assert "'poler' matches no module with parameters. Did you mean 'pooler'" in refused(
        bert(), modules_to_save=["poler"]
    )


# --- tied weights and notes ----------------------------------------------------------------------


def test_a_tied_weight_may_be_adapted_once_and_it_is_said():
    model = llama(tied=True)
    record = rw.attach(model, rw.LoRA(r=2, target_modules=["embed_tokens"]))
    assert record.notes[0] == (
        "'model.embed_tokens' shares its weight with lm_head: the update applies to "
        "'model.embed_tokens' only, and merging gives it a weight of its own (tied=True puts it "
        "on both)."
    )


def test_a_tied_weight_is_not_adapted_twice():
    message = refused(llama(tied=True), target_modules=["embed_tokens", "lm_head"])
    assert message.count("share one weight, and both are targets") == 1


def test_training_a_tied_head_unties_it_and_it_is_said():
    record = rw.attach(llama(tied=True), rw.LoRA(r=2, head="train"))
    assert any(
        "'lm_head' shares its weight with model.embed_tokens: the copy that trains is separate"
        in note
        for note in record.notes
    )


def test_one_module_in_two_places_is_not_called_tied():
    model: Any = Plain()
    model.twin = model.body
    record = rw.attach(model, rw.LoRA(r=2, target_modules=["body"], head="freeze"))
    assert record.notes == ()


def test_a_rank_that_reaches_the_full_rank_is_noted_with_the_right_layer():
    record = rw.attach(
        Plain(), rw.LoRA(r=2, target_modules=["body", "out"], rank_pattern={"out": 3})
    )
    [note] = record.notes
    assert note == (
        "r reaches the full rank of 1 adapted layer(s), the first being 'out' (3, 6); a smaller r "
        "loses nothing."
    )


# --- it learns -----------------------------------------------------------------------------------


def fitted(r: int, steps: int = 400) -> tuple[float, float, bool]:
    """Fit a teacher W0 + D with rank D = 2 on whitened inputs, by torch's L-BFGS.

    Returns the loss, the least loss that rank r allows (Eckart-Young, from numpy's singular values
    of D), and whether the frozen weight and bias kept every bit.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    before = [p.detach().clone() for p in model.parameters()]
    left, right = torch.randn(10, 2).double(), torch.randn(2, 12).double()
    difference = left @ torch.diag(torch.tensor([1.0, 0.4]).double()) @ right
    x = math.sqrt(24) * torch.linalg.qr(torch.randn(24, 12).double())[0]  # xᵀ x = 24 I
    with torch.no_grad():
        target = model(x) + x @ difference.T
    rw.attach(model, rw.LoRA(r=r, alpha=r, target_modules=["0"]))
    optimizer = torch.optim.LBFGS(
        [p for p in model.parameters() if p.requires_grad],
        max_iter=steps,
        tolerance_grad=1e-14,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        return (model(x) - target).square().sum(-1).mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    least = (np.linalg.svd(difference.numpy(), compute_uv=False)[r:] ** 2).sum()
    [layer] = lora_layers(model).values()
    kept = zip(layer.base_layer.parameters(), before, strict=True)
    unchanged = all(torch.equal(now, then) for now, then in kept)
    return loss().item(), float(least), unchanged


@pytest.mark.parametrize("r", [2, 3])
def test_enough_rank_recovers_the_teacher(r: int):
    loss, _, unchanged = fitted(r)
    assert loss < 1e-6
    assert unchanged


def test_too_little_rank_reaches_the_bound_of_eckart_and_young_and_no_more():
    loss, least, unchanged = fitted(1)
    assert least > 1
    assert least * (1 - 1e-9) <= loss < least * 1.01
    assert unchanged


def test_all_linear_leaves_out_what_trains_whole() -> None:
    """A pooler that the checkpoint left random trains whole; all-linear does not adapt it too."""
    model = bert()
    plan = rw.LoRA(target_modules="all-linear", modules_to_save=["pooler"]).plan(model)
    assert not [p.site.name for p in plan.placements if "pooler." in p.site.name]
    assert {"bert.pooler", "classifier"} <= {p.site.name for p in plan.placements}


def test_a_target_that_reaches_into_a_fresh_head_needs_a_word() -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    model = RobertaForSequenceClassification(config)
    with pytest.raises(UserError, match=r"'classifier\.dense' too"):
        rw.LoRA(target_modules=["dense"]).plan(model)
    plan = rw.LoRA(target_modules=["dense"], exclude_modules=["classifier"]).plan(model)
    assert "classifier" in {p.site.name for p in plan.placements}
    assert rw.LoRA(target_modules=["dense"], head="freeze").plan(model)
