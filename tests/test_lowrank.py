"""The formula against numpy: δ, its size, singular values and best approximation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.lowrank import Factors, count, rank_problems, scaling

SIZES = st.integers(1, 12)
SCALES = st.floats(0.01, 100)


def drawn(out: int, inside: int, r: int, scale: float = 1.0) -> Factors:
    """Random factors in float64."""
    make = torch.Generator().manual_seed(out * 1000 + inside * 100 + r)
    return Factors(
        A=torch.randn(r, inside, generator=make, dtype=torch.float64),
        B=torch.randn(out, r, generator=make, dtype=torch.float64),
        scale=scale,
    )


def dense(factors: Factors) -> np.ndarray:
    """δ by numpy alone."""
    return factors.scale * (factors.B.numpy() @ factors.A.numpy())


# --- scaling and counting ------------------------------------------------------------------------


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert scaling(8, 16) == 2.0
    assert scaling(3, 1.5) == 0.5
    assert scaling(16, 8, rank_stabilized=True) == 2.0
    assert scaling(2, 1, rank_stabilized=True) == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("r", [0, -1, 1.0, "4", True, None])
def test_scaling_refuses_a_rank_that_is_none(r: object):
    with pytest.raises(UserError, match="r must be a whole number of 1 or more"):
        scaling(r, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, "16", True, None])
def test_scaling_refuses_an_alpha_that_is_none(alpha: object):
    with pytest.raises(UserError, match="alpha must be a"):
        scaling(4, alpha)  # type: ignore[arg-type]


@given(out=SIZES, inside=SIZES, r=SIZES)
def test_the_count_by_formula_is_the_count_of_the_numbers_held(out: int, inside: int, r: int):
    assert count(out, inside, r) == r * (inside + out) == drawn(out, inside, r).count()


# --- δ -------------------------------------------------------------------------------------------


@given(out=SIZES, inside=SIZES, r=SIZES, scale=SCALES)
def test_delta_is_the_formula(out: int, inside: int, r: int, scale: float):
    factors = drawn(out, inside, r, scale)
    assert (factors.out_features, factors.in_features, factors.r) == (out, inside, r)
    np.testing.assert_allclose(factors.delta().numpy(), dense(factors), rtol=1e-12, atol=1e-12)


@given(out=SIZES, inside=SIZES, r=SIZES, scale=SCALES, lead=st.sampled_from([(), (5,), (2, 3)]))
def test_apply_is_delta_times_x(out: int, inside: int, r: int, scale: float, lead: tuple[int, ...]):
    factors = drawn(out, inside, r, scale)
    x = torch.randn(*lead, inside, dtype=torch.float64)
    expected = x.numpy() @ dense(factors).T
    np.testing.assert_allclose(factors.apply(x).numpy(), expected, rtol=1e-9, atol=1e-9 * scale)


def test_delta_keeps_the_dtype_and_the_gradient_of_the_factors():
    A = torch.randn(2, 5, requires_grad=True)
    B = torch.randn(4, 2, requires_grad=True)
    delta = Factors(A, B, 3.0).delta()
    assert delta.dtype == torch.float32
    delta.sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    torch.testing.assert_close(A.grad, 3.0 * B.detach().sum(0)[:, None].expand(2, 5))
    torch.testing.assert_close(B.grad, 3.0 * A.detach().sum(1)[None, :].expand(4, 2))


def test_factors_are_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        drawn(2, 2, 1).scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("a", "b"), [((2, 5), (4, 3)), ((5,), (4, 5)), ((2, 5), (2, 4)), ((1, 2, 5), (4, 2))]
)
def test_factors_that_do_not_chain_are_refused_with_both_shapes(
    a: tuple[int, ...], b: tuple[int, ...]
):
    with pytest.raises(UserError) as caught:
        Factors(torch.zeros(a), torch.zeros(b), 1.0)
    assert str(a) in str(caught.value)
    assert str(b) in str(caught.value)


# --- singular values and truncation --------------------------------------------------------------


@given(out=SIZES, inside=SIZES, r=SIZES, scale=SCALES)
def test_singular_values_are_those_of_the_dense_matrix(out: int, inside: int, r: int, scale: float):
    factors = drawn(out, inside, r, scale)
    k = min(out, inside, r)
    expected = np.linalg.svd(dense(factors), compute_uv=False)[:k]
    found = factors.singular_values()
    assert found.dtype == torch.float64
    assert found.shape == (k,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-11 * expected[0])


@given(out=SIZES, inside=SIZES, r=SIZES)
def test_the_core_has_orthonormal_bases_and_gives_delta_back(out: int, inside: int, r: int):
    factors = drawn(out, inside, r, 0.7)
    q_b, core, q_a = (t.numpy() for t in factors.core())
    assert max(q_b.shape[1], q_a.shape[1]) <= r
    np.testing.assert_allclose(q_b.T @ q_b, np.eye(q_b.shape[1]), atol=1e-12)
    np.testing.assert_allclose(q_a.T @ q_a, np.eye(q_a.shape[1]), atol=1e-12)
    np.testing.assert_allclose(q_b @ core @ q_a.T, dense(factors), atol=1e-11)


@given(out=SIZES, inside=SIZES, r=SIZES, data=st.data())
@settings(max_examples=60)
def test_truncation_is_as_good_as_eckart_and_young_allow(
    out: int, inside: int, r: int, data: st.DataObject
):
    factors = drawn(out, inside, r, 1.3)
    k = data.draw(st.integers(1, min(out, inside, r)))
    short = factors.truncate(k)
    assert (short.r, short.scale) == (k, 1.0)
    error = np.linalg.norm(dense(factors) - dense(short)) ** 2
    sigma = np.linalg.svd(dense(factors), compute_uv=False)
    assert error == pytest.approx((sigma[k:] ** 2).sum(), rel=1e-8, abs=1e-20 + 1e-22 * sigma[0])


def test_truncation_to_the_whole_rank_changes_nothing():
    factors = drawn(9, 7, 3, 2.0)
    np.testing.assert_allclose(dense(factors.truncate(3)), dense(factors), atol=1e-12)


def test_truncation_keeps_the_dtypes_of_the_factors():
    factors = Factors(torch.randn(3, 8), torch.randn(6, 3, dtype=torch.bfloat16), 1.0)
    short = factors.truncate(2)
    assert (short.A.dtype, short.B.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_truncation_refuses_a_rank_that_is_not_there(k: int):
    with pytest.raises(UserError, match="k must be between 1 and 3"):
        drawn(9, 7, 3).truncate(k)


def test_a_zero_update_has_zero_singular_values():
    values = Factors(torch.randn(3, 8), torch.zeros(6, 3), 2.0).singular_values()
    assert torch.equal(values, torch.zeros(3, dtype=torch.float64))


def test_what_is_wrong_with_a_rank_is_one_sentence_with_its_name():
    for fine in (1, 64):
        assert [*rank_problems("r", fine)] == []
    for wrong in (0, -1, 2.0, True, "4", None):
        told = f"slot must be a whole number of 1 or more, got {wrong!r}."
        assert [*rank_problems("slot", wrong)] == [told]
    assert [*rank_problems("r", None, optional=True)] == []
    assert "or None, got 0" in next(rank_problems("r", 0, optional=True))
