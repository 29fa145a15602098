"""The neutral adapter: taken off one model, put on another, and refused where it does not fit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import ArtifactError, UserError
from rankwise.lowrank import Factors


class Model(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, width)
        self.body = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.body(self.tokens(ids)))))


IDS = torch.tensor([1, 2, 3, 8])
METHOD = rw.LoRA(
    r=2,
    alpha=3,
    target_modules=["tokens", "body"],
    rank_pattern={"body": 4},
    head="train",
    modules_to_save=["norm"],
)


def trained() -> tuple[Model, dict[str, Tensor]]:
    """A model after some training, and the state of its base before."""
    model = Model()
    start = {k: t.clone() for k, t in model.state_dict().items()}
    rw.attach(model, METHOD)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    return model.eval(), start


def test_an_adapter_put_on_a_copy_of_the_base_gives_the_same_outputs():
    model, start = trained()
    adapter = rw.adapter_of(model)
    twin = Model()
    twin.load_state_dict(start)
    record = rw.attach(twin, adapter)
    assert torch.equal(twin.eval()(IDS), model(IDS))
    assert record.method == METHOD
    assert set(record.originals) == {"norm", "head"}
    trains = {n for n, p in twin.named_parameters() if p.requires_grad}
    assert trains == {n for n, p in model.named_parameters() if p.requires_grad}
    again = rw.adapter_of(twin)
    assert all(torch.equal(again.factors[n].A, f.A) for n, f in adapter.factors.items())


def test_an_adapter_holds_factors_and_whole_modules_with_their_buffers():
    model, _ = trained()
    adapter = rw.adapter_of(model)
    assert {
        n: (f.out_features, f.in_features, f.r, f.scale) for n, f in adapter.factors.items()
    } == {
        "tokens": (6, 9, 2, 1.5),
        "body": (6, 6, 4, 0.75),
    }
    assert set(adapter.modules) == {"head", "norm"}
    assert set(adapter.trained or {}) == {
        *("head.weight", "head.bias", "norm.weight", "norm.bias"),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    }


def test_an_adapter_is_a_copy():
    model, _ = trained()
    adapter = rw.adapter_of(model)
    before = adapter.factors["body"].A.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(adapter.factors["body"].A, before)
    assert (adapter.trained or {})["head.weight"].any()
    assert not adapter.factors["body"].A.requires_grad


def test_putting_an_adapter_on_writes_nothing_into_it():
    model, _ = trained()
    adapter = rw.adapter_of(model)
    before = adapter.factors["body"].B.clone()
    twin = Model()
    rw.attach(twin, adapter)
    with torch.no_grad():
        twin.get_parameter("body.updates.default.lora_B").zero_()
    assert torch.equal(adapter.factors["body"].B, before)


def test_an_adapter_of_another_base_is_refused_with_everything_that_is_wrong():
    adapter = rw.adapter_of(trained()[0])
    other = nn.ModuleDict(
        {"tokns": nn.Embedding(9, 6), "body": nn.Linear(5, 6), "head": nn.Linear(6, 3)}
    )
    keys = list(other.state_dict())
    with pytest.raises(ArtifactError) as caught:
        rw.attach(other, adapter)
    message = str(caught.value)
    assert "no module 'tokens'. Did you mean 'tokns'?" in message
    assert "'body' maps 5 to 6 in the model and maps 6 to 6 in the adapter" in message
    assert "no module 'norm'" in message
    assert "module 'head' holds {'weight': (3, 6)" in message
    assert list(other.state_dict()) == keys


def test_factors_that_contradict_their_method_are_refused():
    adapter = rw.adapter_of(trained()[0])
    factors = {**adapter.factors, "body": Factors(torch.ones(3, 6), torch.ones(6, 3), 1.0)}
    with pytest.raises(ArtifactError, match="'body' has factors of rank 3 with scale 1, and its"):
        rw.attach(Model(), replace(adapter, factors=factors))


def test_a_site_that_cannot_be_adapted_is_refused_with_the_reason():
    adapter = rw.adapter_of(trained()[0])
    model = Model()
    model.body = nn.Sequential(nn.Linear(6, 6))  # type: ignore[assignment]
    with pytest.raises(ArtifactError, match="'body' cannot be adapted: Sequential is not one of"):
        rw.attach(model, adapter)


def test_an_adapter_needs_no_whole_modules():
    model = Model()
    rw.attach(model, rw.LoRA(r=2, target_modules=["body"], head="freeze"))
    adapter = rw.adapter_of(model)
    assert adapter.modules == ()
    rw.detach(model)
    assert rw.attach(model, adapter).notes == ()


@pytest.mark.parametrize("method", [rw.HeadOnly(), rw.Full()])
def test_methods_without_factors_have_no_adapter_to_take(method):
    model = Model()
    rw.attach(model, method)
    with pytest.raises(UserError, match="has no low-rank factors"):
        rw.adapter_of(model)
