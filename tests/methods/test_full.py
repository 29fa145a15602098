"""Full fine-tuning: every floating-point parameter trains, in place."""

import torch
from torch import nn

import rankwise as rw


def test_every_parameter_trains_and_no_module_is_added():
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.LayerNorm(4))
    parameters = dict(model.named_parameters())
    rw.attach(model, rw.Full())
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert all(p.requires_grad for p in model.parameters())


def test_whole_numbers_stay_frozen():
    model = nn.Sequential(nn.Linear(3, 4))
    model.register_parameter("table", nn.Parameter(torch.ones(2, dtype=torch.int64), False))
    rw.attach(model, rw.Full())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.weight", "0.bias"}


def test_what_trained_stays_trained_after_detach():
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False))
    rw.attach(model, rw.Full())
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(7)
    rw.detach(model)
    weight = model.get_parameter("0.weight")
    assert torch.equal(weight, torch.full((4, 3), 7.0))
    assert not weight.requires_grad
