"""Random starts: the distribution of the random factors and the reproducibility of a draw."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rankwise.errors import UserError
from rankwise.inits import Gaussian, Init, Kaiming, Orthogonal, Place
from rankwise.lowrank import Factors

PlaceOf = Callable[..., Place]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kaiming_draws_what_torch_draws_for_a_linear_layer(place_of: PlaceOf):
    # The witness is torch.nn.init with a = √5, the start of nn.Linear.
    theirs = torch.empty(64, 256)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=seeded())
    start = Kaiming().start(place_of(nn.Linear(256, 8), r=64), seeded())
    torch.testing.assert_close(start.A, theirs, rtol=1e-6, atol=0)
    assert not start.B.any()


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
    init: Kaiming | Gaussian, lookup: bool, shape: tuple[int, int], std: float
):
    factor = torch.empty(shape)
    (init.lookup if lookup else init.draw)(factor)
    n = factor.numel()
    assert abs(factor.mean().item()) < 4 * std / math.sqrt(n)
    assert factor.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n))


def test_an_embedding_starts_with_a_random_b(place_of: PlaceOf):
    start = Kaiming().start(place_of(nn.Embedding(40, 6)), seeded())
    assert (start.A.shape, start.B.shape) == ((4, 40), (6, 4))
    assert not start.A.any()
    assert torch.equal(start.B, torch.empty(6, 4).normal_(generator=seeded()))


@pytest.mark.parametrize("init", [Kaiming(), Gaussian()], ids=repr)
def test_a_bank_is_drawn_weight_by_weight(place_of: PlaceOf, bank_of: PlaceOf, init: Init):
    together = init.start(bank_of(torch.zeros(3, 7, 5)), seeded())
    generator = seeded()
    one_by_one = [init.start(place_of(nn.Linear(5, 7)), generator).A for _ in range(3)]
    assert torch.equal(together.A, torch.stack(one_by_one))
    assert not together.B.any()


@pytest.mark.parametrize("init", [Kaiming(), Gaussian(), Orthogonal()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_0_adds_exactly_nothing(place_of: PlaceOf, init: Init, dtype: torch.dtype):
    start = init.start(place_of(nn.Linear(33, 21, dtype=dtype), r=6))
    factors = Factors(start.A, start.B, 2.0)
    assert not start.subtract
    assert start.A.dtype == dtype
    assert start.A.any()
    assert not factors.delta().any()
    assert not factors.apply(torch.randn(9, 33, dtype=dtype)).any()


@pytest.mark.parametrize("init", [Kaiming(), Gaussian(), Orthogonal()], ids=repr)
def test_one_generator_state_gives_one_start(place_of: PlaceOf, init: Init):
    place = place_of(nn.Linear(6, 9))
    first, second, third = (init.start(place, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)
    assert not torch.equal(first.A, third.A)


def test_without_a_generator_torchs_own_is_used(place_of: PlaceOf):
    place = place_of(nn.Linear(6, 9))
    torch.manual_seed(3)
    assert torch.equal(Kaiming().start(place).A, Kaiming().start(place, seeded()).A)


def test_a_draw_may_fill_a_parameter():
    factor = torch.nn.Parameter(torch.zeros(2, 3))
    Kaiming().draw(factor)
    assert factor.requires_grad
    assert (factor != 0).all()


def test_starts_are_values():
    assert Kaiming() == Kaiming()
    assert Kaiming() != Gaussian()
    assert repr(Orthogonal()) == "Orthogonal()"


def test_orthogonal_is_pefts_up_to_a_rotation_of_the_rank(place_of: PlaceOf):
    # AᵀA and BBᵀ are all that the first step of gradient descent sees. PEFT's have the same rank,
    # r/2 each, the same size and the same zero product; only its basis of the rank is random.
    import peft

    layer = nn.Sequential(nn.Linear(300, 200))
    config = peft.LoraConfig(r=64, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    A, B = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
    start = Orthogonal().start(place_of(nn.Linear(300, 200), r=64))
    for ours, other in ((start.A, A), (start.B.T, B.T)):
        assert torch.linalg.matrix_rank(ours) == torch.linalg.matrix_rank(other) == 32
        assert ours.norm().item() == pytest.approx(other.norm().item(), rel=0.05)
    assert (B @ A).abs().max() < 1e-5
    assert not (start.B @ start.A).any()


def test_orthogonal_trains_both_factors_from_the_first_step(place_of: PlaceOf):
    start = Orthogonal().start(place_of(nn.Linear(12, 9)))
    A, B = start.A.requires_grad_(), start.B.requires_grad_()
    (torch.randn(5, 9) * (torch.randn(5, 12) @ A.T @ B.T)).sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    assert A.grad.any()
    assert B.grad.any()


def test_orthogonal_starts_every_weight_of_a_bank(bank_of: PlaceOf):
    start = Orthogonal().start(bank_of(torch.zeros(3, 7, 5)))
    assert not (start.B @ start.A).any()
    assert len({tuple(a.flatten().tolist()) for a in start.A}) == 3


def test_orthogonal_refuses_an_odd_rank_and_an_embedding(place_of: PlaceOf):
    with pytest.raises(UserError, match=r"'here': Orthogonal .* must be even, got 3\. Take 4\."):
        Orthogonal().start(place_of(nn.Linear(6, 9), r=3, name="here"))
    with pytest.raises(UserError, match=r"'wte': Orthogonal is not defined for an embedding"):
        Orthogonal().start(place_of(nn.Embedding(6, 9), name="wte"))
