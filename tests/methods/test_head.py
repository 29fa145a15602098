"""Head-only training: the head's copy, further modules, and what is said when there is none."""

import pytest
import torch
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import rankwise as rw
from rankwise.errors import UserError
from rankwise.methods.head import head_modules, outermost, tied_partners


def distilbert() -> DistilBertForSequenceClassification:
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    )


def roberta() -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
        )
    )


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_whole_head_trains_and_nothing_else():
    model = distilbert()
    record = rw.attach(model, rw.HeadOnly())
    assert head_modules(model) == ("pre_classifier", "classifier")
    assert trainable(model) == {
        "pre_classifier.weight",
        "pre_classifier.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert record.adapted == ()
    [note] = record.notes
    assert note == (
        "Trained whole and saved with the adapter: pre_classifier (272 parameters), classifier "
        "(34 parameters). The rest of the base is frozen."
    )


def test_the_numbers_of_the_note_are_those_of_the_model():
    model = distilbert()
    assert sum(p.numel() for p in model.pre_classifier.parameters()) == 272
    assert sum(p.numel() for p in model.classifier.parameters()) == 34


def test_further_modules_train_too():
    model = roberta()
    rw.attach(model, rw.HeadOnly(modules_to_save=(r".*output\.LayerNorm",)))
    extra = {n for n in trainable(model) if not n.startswith("classifier.")}
    place = "roberta.encoder.layer.0"
    assert extra == {
        f"{place}.{part}.LayerNorm.{kind}"
        for part in ("attention.output", "output")
        for kind in ("weight", "bias")
    }


def test_a_part_of_the_head_named_again_is_the_heads_own_copy():
    model = roberta()
    dense = model.get_submodule("classifier.dense")
    record = rw.attach(model, rw.HeadOnly(modules_to_save=("classifier.dense",)))
    assert list(record.originals) == ["classifier"]
    assert record.originals["classifier"].get_submodule("dense") is dense
    with torch.no_grad():
        model.get_parameter("classifier.dense.weight").zero_()
    rw.detach(model)
    assert model.get_submodule("classifier.dense") is dense
    assert dense.get_parameter("weight").any()


def test_a_model_without_a_head_has_nothing_to_train():
    with pytest.raises(UserError, match="has no output layer that Rankwise can find"):
        rw.attach(roberta().roberta, rw.HeadOnly())


def test_a_named_module_is_a_head_enough():
    model = nn.Sequential(nn.LayerNorm(3), nn.ReLU())
    rw.attach(model, rw.HeadOnly(modules_to_save=("0",)))
    assert trainable(model) == {"0.weight", "0.bias"}


def test_an_unmatched_name_is_an_error():
    with pytest.raises(UserError, match="'clasifier' matches no module with parameters"):
        rw.attach(roberta(), rw.HeadOnly(modules_to_save=("clasifier",)))


def test_outermost_drops_what_lies_inside_and_not_what_begins_alike():
    names = ["head.dense", "head", "header", "head.dense.x", "head"]
    assert outermost(names) == ["head", "header"]


def test_partners_are_other_modules_that_hold_the_same_weight():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    assert list(tied_partners(model, ["a", "b", "c"])) == []
    model["b"].weight = model["a"].weight
    assert list(tied_partners(model, ["a", "b", "c"])) == [("a", ["b"]), ("b", ["a"])]
