"""Sums of updates: numpy's dense sums and SVDs are the witness, and no dense matrix is made."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankwise.errors import UserError
from rankwise.lowrank import Factors
from rankwise.methods.combining.sums import SVD, Concatenate, Distance, distance

SIZES = st.integers(1, 9)
WEIGHTS = st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)


@st.composite
def updates(draw: st.DrawFn) -> list[Factors]:
    """One to four updates of one weight, or of one bank, their ranks and scales their own."""
    out, inside = draw(SIZES), draw(SIZES)
    bank = draw(st.sampled_from([(), (), (3,)]))
    make = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def one(r: int, scale: float) -> Factors:
        return Factors(
            torch.randn(*bank, r, inside, generator=make),
            torch.randn(*bank, out, r, generator=make),
            scale,
        )

    return [one(draw(SIZES), draw(WEIGHTS)) for _ in range(draw(st.integers(1, 4)))]


def dense(factors: Factors) -> np.ndarray:
    """δ by numpy alone."""
    return factors.scale * (factors.B.double().numpy() @ factors.A.double().numpy())


def total(parts: Sequence[Factors]) -> np.ndarray:
    return sum((dense(part) for part in parts), np.zeros(()))


def most(parts: Sequence[Factors]) -> int:
    return min(sum(p.r for p in parts), parts[0].out_features, parts[0].in_features)


def measured(wanted: np.ndarray, factors: Factors) -> Distance:
    return Distance(np.linalg.norm(wanted).item(), np.linalg.norm(wanted - dense(factors)).item())


# --- concatenation -------------------------------------------------------------------------------


@given(parts=updates())
def test_concatenation_is_the_sum_whatever_the_ranks(parts: list[Factors]):
    joined = Concatenate().join(parts, "layer")
    wanted = total(parts)
    size = np.linalg.norm(wanted) + sum(np.linalg.norm(dense(p)) for p in parts)
    np.testing.assert_allclose(dense(joined.factors), wanted, atol=3e-7 * size)
    assert (joined.factors.r, joined.factors.scale) == (most(parts), 1.0)
    assert joined.factors.A.dtype == joined.factors.B.dtype == torch.float32


@given(parts=updates())
def test_concatenation_keeps_every_a_and_multiplies_every_b_while_the_rank_allows(parts):
    if sum(p.r for p in parts) > most(parts):
        return
    joined = Concatenate().join(parts, "layer").factors
    assert torch.equal(joined.A, torch.cat([p.A for p in parts], dim=-2))
    expected = torch.cat([(p.B.double() * p.scale).float() for p in parts], dim=-1)
    assert torch.equal(joined.B, expected)


@given(parts=updates())
def test_the_errors_are_those_that_numpy_measures(parts: list[Factors]):
    for how in (Concatenate(), SVD(r=2)):
        joined = how.join(parts, "layer")
        found, expected = joined.cut, measured(total(parts), joined.factors)
        assert joined.shift == found
        assert found.wanted == pytest.approx(expected.wanted, rel=1e-9, abs=1e-12)
        assert found.lost == pytest.approx(expected.lost, rel=1e-6, abs=1e-12 * expected.wanted)


def test_short_factors_become_float32_and_long_ones_stay_float64():
    def pair(dtype: torch.dtype) -> Factors:
        return Factors(torch.randn(2, 8, dtype=dtype), torch.randn(6, 2, dtype=dtype), 0.3)

    short = [pair(torch.bfloat16), pair(torch.bfloat16)]
    joined = Concatenate().join(short, "layer")
    assert joined.factors.A.dtype == torch.float32
    assert joined.cut.error < 1e-7  # and not bfloat16's 4e-3
    assert SVD().join([*short, pair(torch.float64)], "layer").factors.B.dtype == torch.float64


def test_updates_that_cancel_leave_zero_and_no_nan():
    one = Factors(torch.randn(2, 5), torch.randn(4, 2), 1.0)
    for how in (Concatenate(), SVD(), SVD(energy=0.9)):
        joined = how.join([one, Factors(one.A, one.B, -1.0)], "layer")
        assert np.abs(dense(joined.factors)).max() < 1e-6
        assert torch.isfinite(joined.factors.A).all()
    zero = SVD(energy=0.9).join([Factors(one.A, torch.zeros(4, 2), 1.0)], "layer")
    assert (zero.factors.r, zero.cut.error) == (1, 0.0)


# --- the best approximation ----------------------------------------------------------------------


@given(parts=updates(), r=st.integers(1, 12))
@settings(max_examples=60)
def test_svd_is_as_good_as_eckart_and_young_allow(parts: list[Factors], r: int):
    joined = SVD(r).join(parts, "layer")
    wanted = total(parts)
    sigma = np.linalg.svd(wanted, compute_uv=False)
    k = min(r, most(parts))
    best = np.sqrt((sigma[..., k:] ** 2).sum())
    assert joined.factors.r == k
    size = np.linalg.norm(wanted)
    assert measured(wanted, joined.factors).lost == pytest.approx(best, rel=1e-6, abs=1e-6 * size)


@given(parts=updates(), energy=st.floats(0.05, 1.0))
def test_energy_takes_the_fewest_singular_values_that_hold_it(parts: list[Factors], energy: float):
    joined = SVD(energy=energy).join(parts, "layer")
    sigma = np.linalg.svd(total(parts), compute_uv=False)
    energies = (sigma**2).reshape(-1, sigma.shape[-1]).sum(axis=0)
    held = energies.cumsum() / energies.sum()
    k = joined.factors.r
    assert held[k - 1] >= energy - 1e-9
    assert k == 1 or held[k - 2] < energy + 1e-9
    assert joined.cut.error <= np.sqrt(1 - energy) + 1e-6


def test_a_rank_beside_an_energy_is_the_most_that_is_taken():
    parts = [Factors(torch.randn(6, 20), torch.randn(20, 6), 1.0)]
    assert SVD(r=2, energy=1.0).join(parts, "layer").factors.r == 2
    assert SVD(r=5, energy=0.01).join(parts, "layer").factors.r == 1


def test_with_neither_the_rank_is_the_largest_of_the_updates():
    ranks = (2, 5, 3)
    parts = [Factors(torch.randn(r, 30), torch.randn(20, r), 1.0) for r in ranks]
    assert SVD().join(parts, "layer").factors.r == 5


def test_no_dense_matrix_is_ever_made():
    out, inside = 60, 50
    parts = [Factors(torch.randn(3, inside), torch.randn(out, 3), w) for w in (1.0, -0.5, 2.0)]
    for how in (Concatenate(), SVD(r=4), SVD(energy=0.9)):
        with Sizes() as seen:
            how.join(parts, "layer")
        assert max(seen.sizes) < out * 2 * 9 + 1 < out * inside
    with Sizes() as seen:  # the witness sees what it should
        parts[0].delta()
    assert max(seen.sizes) == out * inside


class Sizes(TorchDispatchMode):
    """Notes the size of every tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes.extend(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


# --- gaps ----------------------------------------------------------------------------------------


def test_the_error_over_several_weights_is_that_of_their_one_long_vector():
    wanted, found = np.random.randn(3, 7), np.random.randn(3, 7)
    gaps = [
        Distance(np.linalg.norm(w).item(), np.linalg.norm(w - f).item())
        for w, f in zip(wanted, found, strict=True)
    ]
    expected = np.linalg.norm(wanted - found) / np.linalg.norm(wanted)
    assert Distance.over(gaps).error == pytest.approx(expected)


def test_nothing_lost_of_nothing_is_no_error_and_anything_lost_of_nothing_is_infinite():
    assert Distance(0.0, 0.0).error == 0.0
    assert Distance(0.0, 1.0).error == float("inf")
    assert Distance.over([]).error == 0.0


def test_the_distance_to_any_update_is_measured():
    parts = [Factors(torch.randn(2, 9), torch.randn(7, 2), w) for w in (1.0, 0.5)]
    other = Factors(torch.randn(3, 9), torch.randn(7, 3), 1.7)
    found, expected = distance(parts, other), measured(total(parts), other)
    assert (found.wanted, found.lost) == pytest.approx((expected.wanted, expected.lost))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, -1, 1.5, True, "8"])
def test_svd_refuses_a_rank_that_is_none(r: object):
    with pytest.raises(UserError, match="SVD: r must be a whole number of 1 or more, or None"):
        SVD(r=r)  # type: ignore[arg-type]


@pytest.mark.parametrize("energy", [0, -0.1, 1.01, float("nan"), True, "0.9"])
def test_svd_refuses_an_energy_that_is_none(energy: object):
    with pytest.raises(UserError, match="SVD: energy must be a number above 0 and at most 1"):
        SVD(energy=energy)  # type: ignore[arg-type]
