"""Starts: the distribution of the random factor and the reproducibility of a draw."""

import math

import pytest
import torch

from rankwise.inits import Gaussian, Init, Kaiming


def test_kaiming_draws_what_torch_draws_for_a_linear_layer():
    # The witness is torch.nn.init with a = √5, the start of nn.Linear.
    ours, theirs = torch.empty(64, 256), torch.empty(64, 256)
    Kaiming().draw(ours, torch.Generator().manual_seed(3))
    torch.nn.init.kaiming_uniform_(
        theirs, a=math.sqrt(5), generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_kaiming_stays_in_its_bound_and_fills_it():
    factor = torch.empty(200, 100)
    Kaiming().draw(factor)
    assert factor.abs().max() <= 0.1
    assert factor.abs().max() > 0.099
    assert factor.var().item() == pytest.approx(0.1**2 / 3, rel=0.05)


@pytest.mark.parametrize(
    ("init", "lookup", "shape", "std"),
    [
        (Kaiming(), True, (400, 50), 1.0),
        (Gaussian(), False, (50, 400), 1 / 50),
        (Gaussian(), True, (400, 50), 1 / 50),
    ],
)
def test_normal_starts_have_their_mean_and_deviation(
    init: Init, lookup: bool, shape: tuple[int, int], std: float
):
    factor = torch.empty(shape)
    (init.lookup if lookup else init.draw)(factor)
    n = factor.numel()
    assert abs(factor.mean().item()) < 4 * std / math.sqrt(n)
    assert factor.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n))


@pytest.mark.parametrize("init", [Kaiming(), Gaussian()])
@pytest.mark.parametrize("verb", ["draw", "lookup"])
def test_one_generator_state_gives_one_draw(init: Init, verb: str):
    first, second, third = torch.empty(4, 6), torch.empty(4, 6), torch.empty(4, 6)
    getattr(init, verb)(first, torch.Generator().manual_seed(1))
    getattr(init, verb)(second, torch.Generator().manual_seed(1))
    getattr(init, verb)(third, torch.Generator().manual_seed(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_draw_may_fill_a_parameter():
    factor = torch.nn.Parameter(torch.zeros(2, 3))
    Kaiming().draw(factor)
    assert factor.requires_grad
    assert (factor != 0).all()


def test_starts_are_values():
    assert Kaiming() == Kaiming()
    assert Kaiming() != Gaussian()
    assert repr(Gaussian()) == "Gaussian()"
