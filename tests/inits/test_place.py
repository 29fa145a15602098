"""What a place says of its factors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from rankwise.inits import (
    EVA,
    Fitted,
    Gaussian,
    Init,
    Kaiming,
    LoftQ,
    LoRAGA,
    OLoRA,
    Orthogonal,
    PiSSA,
    Place,
)

PlaceOf = Callable[..., Place]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_have_the_shape_dtype_and_device_of_the_place(
    place_of: PlaceOf, dtype: torch.dtype
):
    A, B = place_of(nn.Linear(6, 9, dtype=dtype), r=3).zeros()
    assert (A.shape, B.shape) == ((3, 6), (9, 3))
    assert A.dtype == B.dtype == dtype
    assert not A.any()
    assert not B.any()


def test_a_bank_has_one_more_dimension(bank_of: PlaceOf):
    A, B = bank_of(torch.zeros(5, 9, 6), r=3).zeros()
    assert (A.shape, B.shape) == ((5, 3, 6), (5, 9, 3))


INITS: list[Init] = [Kaiming(), Gaussian(), Orthogonal(), PiSSA(), OLoRA(), LoftQ({})]
FITTED: list[Fitted] = [EVA([]), LoRAGA([])]


def on_meta(place: Place) -> Place:
    def weight() -> torch.Tensor:
        raise AssertionError("nothing is computed on meta")

    return replace(place, device=torch.device("meta"), weight=weight)


@pytest.mark.parametrize("init", INITS, ids=lambda init: type(init).__name__)
def test_on_meta_there_are_shapes_and_no_random_numbers_drawn(place_of: PlaceOf, init: Init):
    place = on_meta(place_of(nn.Linear(6, 9)))
    before = torch.get_rng_state()
    start = init.start(place)
    assert start.A.is_meta
    assert start.B.is_meta
    assert (start.A.shape, start.B.shape) == ((4, 6), (9, 4))
    assert start.subtract == isinstance(init, PiSSA | OLoRA)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init", FITTED, ids=lambda init: type(init).__name__)
def test_on_meta_no_model_is_run(place_of: PlaceOf, init: Fitted):
    place = on_meta(place_of(nn.Linear(8, 9)))
    starts = init.fit(nn.Module(), [place])
    assert starts["layer"].A.is_meta
    assert (starts["layer"].A.shape, starts["layer"].B.shape) == ((4, 8), (9, 4))
    assert starts["layer"].subtract == isinstance(init, LoRAGA)
