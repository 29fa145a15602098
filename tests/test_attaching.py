"""attach and detach: what is put in, what trains, the way back, and failures that touch nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import Placement, Plan, lora_layers, trained_copies
from rankwise.errors import UserError
from rankwise.layers import LoRALinear
from rankwise.targets import sites


class Model(nn.Module):
    """A shared module, a frozen part, a buffer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4).requires_grad_(False)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(torch.relu(self.first(self.tokens(ids))))
        return self.head(self.norm(self.second(x)))


IDS = torch.tensor([1, 2, 3, 8])
LORA = rw.LoRA(r=2, alpha=6, target_modules=["first", "second", "tokens"], head="train")


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a failure must leave alone."""
    return {
        "modules": {n: id(m) for n, m in model.named_modules(remove_duplicate=False)},
        "parameters": {
            n: (id(p), p.requires_grad, p._version, p.detach().clone().numpy().tobytes())
            for n, p in model.named_parameters(remove_duplicate=False)
        },
        "training": {n: m.training for n, m in model.named_modules()},
        "keys": list(model.state_dict()),
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [LORA, rw.HeadOnly(), rw.Full(), rw.HeadOnly(modules_to_save=("norm",))],
    ids=lambda method: type(method).__name__,
)
def test_detach_gives_back_the_same_model(method):
    model = Model()
    model.second.eval()
    before = state(model)
    rw.attach(model, method)
    rw.detach(model)
    assert state(model) == before


def test_attach_returns_and_leaves_a_record():
    model = Model()
    record = rw.attach(model, LORA)
    assert rw.attachment(model) is record
    assert record.method is LORA
    assert record.adapted == ("tokens", "first", "second")
    assert list(record.originals) == ["head"]
    assert any("head (10 parameters)" in note for note in record.notes)


def test_the_record_is_neither_a_module_nor_a_tensor_of_the_model():
    model = Model()
    head = model.head
    rw.attach(model, LORA)
    assert all(module is not head for module in model.modules())
    assert all(parameter is not head.weight for parameter in model.parameters())


def test_a_shared_module_is_adapted_once_and_in_every_place():
    model = Model()
    rw.attach(model, LORA)
    assert model.first is model.again
    assert isinstance(model.again, LoRALinear)
    assert set(lora_layers(model)) == {"tokens", "first", "second"}


def test_exactly_the_declared_parameters_train():
    model = Model()
    rw.attach(model, LORA)
    assert trainable(model) == {
        *(
            f"{m}.updates.default.lora_{half}"
            for m in ("tokens", "first", "second")
            for half in "AB"
        ),
        "head.weight",
        "head.bias",
    }
    number = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert number == 2 * (9 + 4) + 2 * (4 + 4) + 2 * (4 + 4) + (4 * 2 + 2)


def test_the_trained_head_is_a_copy_and_the_original_is_kept_untouched():
    model = Model()
    original = model.head
    weight = original.weight.detach().clone()
    rw.attach(model, LORA)
    copied = trained_copies(model)["head"]
    assert copied is model.head
    assert copied is not original
    assert torch.equal(model.head.weight, weight)
    with torch.no_grad():
        model.head.weight.add_(1)
    rw.detach(model)
    assert model.head is original
    assert torch.equal(model.head.weight, weight)


def test_overlapping_whole_modules_are_copied_once_and_given_back():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "top": Model()})
    before = state(model)
    record = rw.attach(model, rw.HeadOnly(modules_to_save=("top", "second")))
    assert set(record.originals) == {"top"}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    rw.detach(model)
    assert state(model) == before


# --- one model, one adapter ----------------------------------------------------------------------


def test_a_second_adapter_is_refused_on_the_model_its_parent_and_its_part():
    model = Model()
    parent = nn.Sequential(model, nn.Linear(2, 2))
    rw.attach(model, LORA)
    before = state(model)
    with pytest.raises(UserError, match="This model carries an adapter already"):
        rw.attach(model, LORA)
    with pytest.raises(UserError, match="'0' in this model carries an adapter already"):
        rw.attach(parent, rw.LoRA(target_modules=["1"]))
    with pytest.raises(UserError, match="carries an adapter already"):
        rw.attach(model.first, rw.Full())
    assert state(model) == before


def test_verbs_on_a_plain_model_say_how_to_attach():
    for verb in (rw.detach, rw.attachment, rw.adapter_of):
        with pytest.raises(UserError, match=r"carries no adapter. Attach one with rankwise.attach"):
            verb(Model())
    with pytest.raises(UserError, match="carries no adapter"), rw.base(Model()):
        pass


# --- failures ------------------------------------------------------------------------------------


class Stumbling:
    """A method whose last placement cannot be built."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def plan(self, model: nn.Module) -> Plan:
        table = sites(model)

        def fall(module: nn.Module) -> nn.Module:
            raise self.error

        good = LORA.plan(model)
        last = Placement(table["norm"], fall)
        return Plan(self, good.additions, (*good.placements, last))


@pytest.mark.parametrize("error", [UserError("no"), RuntimeError("out of memory")])
def test_a_failure_while_building_leaves_the_model_as_it_was(error: Exception):
    model = Model()
    before = state(model)
    with pytest.raises(type(error)):
        rw.attach(model, Stumbling(error))
    assert state(model) == before


@pytest.mark.parametrize(
    "method",
    [
        rw.LoRA(target_modules=["frist"], head="train"),
        rw.LoRA(target_modules=["first"], exclude_modules=["secnd"], head="train"),
        rw.LoRA(target_modules=["first"], rank_pattern={"second": 4}, head="train"),
        rw.LoRA(target_modules=["first"]),  # nothing said about the head
        rw.LoRA(target_modules=["first", "head"], head="train"),
        rw.LoRA(target_modules=["norm"], head="train"),
        rw.HeadOnly(modules_to_save=("nrom",)),
    ],
)
def test_a_refused_method_leaves_the_model_as_it_was(method):
    model = Model()
    before = state(model)
    with pytest.raises(UserError):
        rw.attach(model, method)
    assert state(model) == before


def test_a_head_that_cannot_train_leaves_the_model_as_it_was():
    model = Model()
    model.head.requires_grad_(False).weight.data = torch.ones(2, 4, dtype=torch.int8)
    before = state(model)
    with pytest.raises(RuntimeError, match="floating point"):
        rw.attach(model, rw.HeadOnly())
    assert state(model) == before


# --- without the updates -------------------------------------------------------------------------


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def test_base_is_the_frozen_model_for_the_length_of_the_block():
    model = Model().eval()
    expected = model(IDS)
    moved_model = model
    rw.attach(model, rw.LoRA(r=2, target_modules=["first", "second", "tokens"], head="freeze"))
    moved(moved_model)
    layers = lora_layers(model)
    adapted = model(IDS)
    assert not torch.allclose(adapted, expected)
    with rw.base(model) as plain:
        assert plain is model
        assert torch.equal(model(IDS), expected)
        assert model.again is model.first
        assert model.first.weight is model.first.base_layer.weight
    assert torch.equal(model(IDS), adapted)
    assert lora_layers(model) == layers


def test_base_keeps_a_trained_head_in_its_place():
    model = Model().eval()
    rw.attach(model, LORA)
    moved(model)
    head = model.head
    with rw.base(model):
        assert model.head is head


def test_the_updates_come_back_when_the_block_fails():
    model = Model()
    rw.attach(model, LORA)
    with pytest.raises(KeyError), rw.base(model):
        raise KeyError
    assert set(lora_layers(model)) == {"tokens", "first", "second"}


def test_an_original_head_comes_back_in_the_dtype_it_had():
    model = Model()
    original = model.head
    rw.attach(model, rw.HeadOnly())
    model.head.double()
    rw.detach(model)
    assert model.head is original
    assert model.head.weight.dtype == torch.float32
