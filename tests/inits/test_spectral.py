"""Leading singular triples against numpy's, exact and randomised."""

from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.inits import Place
from rankwise.inits.spectral import balanced, check_iterations, check_rank, dense, leading, live

PlaceOf = Callable[..., Place]
sides = st.integers(1, 40)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decaying(out: int, inside: int, ratio: float) -> Tensor:
    """A matrix whose singular values fall by a ratio, in float64."""
    k = min(out, inside)
    u, v = torch.linalg.qr(random(1, out, k)).Q, torch.linalg.qr(random(2, inside, k)).Q
    return u * ratio ** torch.arange(k, dtype=torch.float64) @ v.T


@given(out=sides, inside=sides, seed=st.integers(0, 99), data=st.data())
def test_the_exact_triples_are_numpys(out: int, inside: int, seed: int, data: st.DataObject):
    k = data.draw(st.integers(1, min(out, inside)))
    matrix = random(seed, out, inside)
    u, sigma, vh = leading(matrix, k, None)
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    np.testing.assert_allclose(sigma, values[:k], rtol=1e-10, atol=1e-12)
    best = (left[:, :k] * values[:k]) @ right[:k]
    np.testing.assert_allclose((u * sigma) @ vh, best, atol=1e-8 * values[0])


@given(out=sides, inside=sides, seed=st.integers(0, 99), iterations=st.sampled_from([None, 0, 3]))
def test_the_triples_are_orthonormal_and_their_signs_fixed(
    out: int, inside: int, seed: int, iterations: int | None
):
    k = (min(out, inside) + 1) // 2
    made = torch.Generator().manual_seed(0)
    u, sigma, vh = leading(random(seed, out, inside), k, iterations, made)
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, eye)
    torch.testing.assert_close(vh @ vh.mT, eye)
    assert (vh.gather(-1, vh.abs().argmax(-1, keepdim=True)) > 0).all()
    assert (sigma.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(120, 80), (80, 120)])
def test_power_iterations_lead_to_the_exact_triples(shape: tuple[int, int]):
    matrix = decaying(*shape, ratio=0.9)
    exact = leading(matrix, 6, None)
    errors: list[float] = []
    for iterations in (0, 1, 4):
        found = leading(matrix, 6, iterations, torch.Generator().manual_seed(0))
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_a_bank_is_decomposed_weight_by_weight():
    matrices = torch.stack([decaying(50, 40, ratio) for ratio in (0.5, 0.6, 0.7)])
    for iterations in (None, 6):
        u, sigma, vh = leading(matrices, 3, iterations, torch.Generator().manual_seed(0))
        for one, *triples in zip(matrices, u, sigma, vh, strict=True):
            for found, exact in zip(triples, leading(one, 3, None), strict=True):
                torch.testing.assert_close(found, exact, rtol=0, atol=1e-7)


def test_the_randomised_form_draws_from_its_generator_alone():
    matrix = random(0, 90, 70)
    before = torch.get_rng_state()
    first, again, other = (
        leading(matrix, 3, 1, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@given(out=sides, inside=sides, rank=st.integers(0, 8), data=st.data())
def test_rounding_is_told_from_singular_values(
    out: int, inside: int, rank: int, data: st.DataObject
):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    rank = min(rank, out, inside)
    matrix = (random(3, out, rank) @ random(4, rank, inside)).to(dtype)
    assert int(live(torch.linalg.svdvals(matrix), max(out, inside)).sum()) == rank


def test_directions_without_a_singular_value_get_a_start_that_can_train(place_of: PlaceOf):
    layer = nn.Linear(10, 12)
    with torch.no_grad():
        layer.weight.copy_(random(3, 12, 2) @ random(4, 2, 10))
    place = place_of(layer, r=5)
    A, B = balanced(place, *leading(dense(place), 5, None), torch.Generator().manual_seed(1))
    torch.testing.assert_close(2.0 * B @ A, layer.weight.detach())
    assert not B[:, 2:].any()
    assert A[2:].abs().min() > 0
    assert A[2:].abs().max() <= 10**-0.5  # Kaiming's bound


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "4"])
def test_iterations_must_be_a_whole_number(wrong: object):
    with pytest.raises(UserError, match="Name: iterations must be a whole number"):
        check_iterations("Name", wrong)  # type: ignore[arg-type]


def test_a_rank_above_the_smaller_side_is_refused(place_of: PlaceOf):
    place = place_of(nn.Linear(9, 3), name="here")
    with pytest.raises(UserError, match=r"'here': Name takes r = 4 .* 3 by 9, which has 3"):
        check_rank("Name", place, 4)


def test_a_weight_that_is_not_finite_or_of_another_shape_is_refused(place_of: PlaceOf):
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[1, 2] = torch.nan
    with pytest.raises(UserError, match="'here': the weight holds numbers that are not finite"):
        dense(place_of(layer, name="here"))
    with pytest.raises(UserError, match=r"'here': the weight is \(4, 4\), expected \(5, 4\)"):
        dense(place_of(layer, name="here", out_features=5))
