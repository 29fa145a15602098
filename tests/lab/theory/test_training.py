"""Gradients on A and B: torch's own optimisers, one layer by itself, and the bound as witnesses."""

import math

import numpy as np
import pytest
import torch

import rankwise
from rankwise.lab.theory.problems import (
    best_update,
    excess,
    sample,
    slanted,
    spectra,
    tail,
    teacher,
)
from rankwise.lab.theory.training import Adam, Descent, start, train
from rankwise.lowrank import Factors


@pytest.fixture
def problems():
    random = np.random.default_rng(0)
    values = spectra(4)
    return [
        teacher("white", values["power law"], 5, 4, random),
        teacher("slanted", values["flat"], 5, 4, random, slanted(4, 9.0, random)),
    ]


def by_torch(problem, factors, entry, make, steps):
    """What torch.optim makes of one problem by itself."""
    x, y, W0 = (torch.from_numpy(value) for value in (problem.x, problem.y, problem.W0))
    A = factors.A[entry].clone().requires_grad_()
    B = factors.B[entry].clone().requires_grad_()
    optimizer = make([A, B])
    for _ in range(steps):
        optimizer.zero_grad()
        (y - x @ (W0 + factors.scale * B @ A).T).square().sum().backward()
        optimizer.step()
    return A.detach(), B.detach()


@pytest.mark.parametrize(
    ("method", "make"),
    [
        (Descent(), lambda p: torch.optim.SGD(p, lr=0.01)),
        (Adam(), lambda p: torch.optim.Adam(p, lr=0.01)),
        (Adam(0.8, 0.95, 1e-6), lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.95), 1e-6)),
    ],
)
def test_each_entry_of_the_bank_is_trained_as_torch_trains_it_by_itself(problems, method, make):
    begun = start(2, 5, 4, 3, 1.5, 0)
    done = train(problems, begun, method, 0.01, 25, settle=False).factors
    for entry, problem in enumerate(problems):
        A, B = by_torch(problem, begun, entry, make, 25)
        torch.testing.assert_close(done.A[entry], A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(done.B[entry], B, rtol=1e-9, atol=1e-12)


def test_a_rate_that_settles_falls_along_half_a_cosine(problems):
    begun = start(2, 5, 4, 2, 2.0, 0)
    done = train(problems, begun, Descent(), 0.02, 10, settle=True).factors

    def make(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.02)
        fall = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * (step + 1) / 10))
        )
        optimizer.register_step_post_hook(lambda *_: fall.step())
        return optimizer

    A, _ = by_torch(problems[0], begun, 0, make, 10)
    torch.testing.assert_close(done.A[0], A)


def test_each_entry_has_its_own_rate_and_none_spoils_another(problems):
    begun = start(2, 5, 4, 2, 2.0, 0)
    both = train(problems, begun, Descent(), torch.tensor([0.01, 1e3]), 60, settle=False)
    alone = train(problems[:1], Factors(begun.A[:1], begun.B[:1], 2.0), Descent(), 0.01, 60,
                  settle=False)  # fmt: skip
    assert not torch.isfinite(both.factors.A[1]).all()
    torch.testing.assert_close(both.factors.A[:1], alone.factors.A)
    torch.testing.assert_close(both.gradient[:1], alone.gradient)


def test_training_leaves_the_start_as_it_is(problems):
    begun = start(2, 5, 4, 2, 2.0, 0)
    A, B = begun.A.clone(), begun.B.clone()
    train(problems, begun, Adam(), 0.1, 5, settle=False)
    assert torch.equal(begun.A, A)
    assert torch.equal(begun.B, B)


def test_the_start_is_the_one_that_an_adapter_has():
    begun = start(3, 5, 400, 6, 2.0, 0)
    assert begun.A.dtype == torch.float64
    assert not begun.delta().any()
    assert begun.A.abs().max() <= 1 / math.sqrt(400)
    assert begun.A.std() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
    assert not torch.equal(begun.A[0], begun.A[1])
    assert torch.equal(begun.A, start(3, 5, 400, 6, 2.0, 0).A)
    assert not torch.equal(begun.A, start(3, 5, 400, 6, 2.0, 1).A)


def test_a_layer_that_rankwise_adapts_takes_the_same_steps(problems):
    problem = problems[0]
    model = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(problem.W0))
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=["0"], head="freeze"))
    factors = rankwise.adapter_of(model).factors["0"]
    assert factors.A.dtype == torch.float64
    begun = Factors(factors.A.detach().clone()[None], factors.B.detach().clone()[None], 2.0)
    done = train([problem], begun, Descent(), 0.01, 7, settle=False).factors
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(7):
        optimizer.zero_grad()
        loss = torch.from_numpy(problem.y) - model(torch.from_numpy(problem.x))
        loss.square().sum().backward()
        optimizer.step()
    trained = rankwise.adapter_of(model).factors["0"]
    torch.testing.assert_close(done.A[0], trained.A.detach())
    torch.testing.assert_close(done.B[0], trained.B.detach())


@pytest.mark.parametrize("r", [1, 2, 3, 5, 6])
def test_gradients_reach_the_bound_of_every_spectrum(r):
    random = np.random.default_rng(1)
    white = [teacher(name, values, 8, 6, random) for name, values in spectra(6).items()]
    other = teacher("slanted", spectra(6)["power law"], 8, 6, random, slanted(6, 30.0, random))
    noisy = sample(white[2], 20, 0.2, random)
    every = [*white, other, noisy]
    done = train(every, start(6, 8, 6, r, 2.0, 0), Adam(beta2=0.95), 0.05, 400, settle=True)
    updates = done.factors.delta().numpy()
    for problem, update in zip(every[:5], updates, strict=False):
        squares = np.linalg.svd(problem.delta @ problem.x, compute_uv=False)[r:] ** 2
        assert excess(problem, update)[0] == pytest.approx(squares.sum(), rel=1e-2, abs=1e-8)
        assert tail(problem.wanted)[r] == pytest.approx(squares.sum(), abs=1e-14)
    np.testing.assert_allclose(updates[5], best_update(noisy, r), atol=1e-3)
    assert done.gradient.max() < 1e-2
