import math

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import UserError
from rankwise.methods.groups import parameter_groups
from rankwise.train.optim import adamw, learning_rate, set_rate


@pytest.mark.parametrize(("total", "warmup"), [(2, 0.5), (10, 0.0), (100, 0.06), (37, 0.5)])
def test_the_rate_is_transformers_schedule_one_warm_up_step_ahead(
    total: int, warmup: float
) -> None:
    """transformers spends a first step at rate 0; here the first step counts already."""
    from transformers import get_linear_schedule_with_warmup

    rising = math.ceil(warmup * total)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = get_linear_schedule_with_warmup(optimizer, rising, total)
    theirs: list[float] = []
    for _ in range(total + 1):
        theirs.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    ours = [learning_rate(step, total, 0.3, warmup) for step in range(total)]
    assert ours[:rising] == pytest.approx(theirs[1 : rising + 1])
    assert ours[rising:] == pytest.approx(theirs[rising:total])


def test_the_rate_rises_falls_and_is_never_zero() -> None:
    rates = [learning_rate(step, 50, 1.0, 0.1) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert all(rate > 0 for rate in rates)
    assert learning_rate(50, 50, 1.0, 0.1) == 0.0
    assert learning_rate(0, 1, 1.0, 0.06) == 1.0


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = adamw(parameter_groups(model, 0.0, weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: decay[id(p)] for n, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_vectors_alone_make_one_group() -> None:
    optimizer = adamw(parameter_groups(nn.LayerNorm(4), 0.0, weight_decay=0.1))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)


def test_the_output_layer_has_a_rate_of_its_own_and_b_another() -> None:
    model = Small()
    rw.attach(model, rw.LoRA(r=2, target_modules=["body.0"], head="train"))
    groups = parameter_groups(model, 0.1, lora_plus=16.0, head=20.0)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates == {
        "body.0.updates.default.lora_A": pytest.approx(0.1),
        "body.0.updates.default.lora_B": pytest.approx(1.6),
        "head.weight": pytest.approx(2.0),
        "head.bias": pytest.approx(2.0),
    }


def test_an_adapted_output_layer_is_no_whole_one() -> None:
    model = Small()
    rw.attach(model, rw.LoRA(r=2, target_modules=["head"]))
    assert [group["lr"] for group in parameter_groups(model, 0.1, head=20.0)] == [0.1]


def test_full_training_tells_its_output_layer_too() -> None:
    model = Small()
    groups = parameter_groups(model, 0.1, head=20.0)
    assert sorted(len(g["params"]) for g in groups if g["lr"] == 2.0) == [1, 1]
    with pytest.raises(UserError, match="head must be a finite ratio above 0"):
        parameter_groups(model, 0.1, head=0.0)


def test_a_step_is_adamw_by_the_formula() -> None:
    """Loshchilov and Hutter 2017, algorithm 2, in float64 by hand."""
    start = torch.randn(3, 2, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = adamw(parameter_groups(nn.ParameterList([weight]), 0.0, weight_decay=0.2))
    w, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t in range(1, 4):
        rate = 0.1 / t
        set_rate(optimizer, rate)
        gradient = torch.randn(3, 2, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w - rate * 0.2 * w - rate * step
    torch.testing.assert_close(weight.data, w, rtol=1e-12, atol=1e-14)
