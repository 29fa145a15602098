"""The spectrum of an update, against NumPy's decomposition of the dense product in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rankwise.errors import UserError
from rankwise.lowrank import Factors
from rankwise.spectrum import Spectrum, share_problems, spectrum

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
kinds = st.sampled_from(["random", "repeated", "zeros", "B zero", "started"])


def made(out: int, inside: int, r: int, seed: int, dtype: torch.dtype, kind: str) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(r, inside, generator=draw, dtype=torch.float64)
    B = torch.randn(out, r, generator=draw, dtype=torch.float64)
    if kind == "repeated":
        A, B = torch.eye(r, inside).double(), torch.eye(out, r).double()
    if kind == "zeros":
        A[r // 2 :] = 0
    if kind == "B zero":
        B = torch.zeros_like(B)
    A, B = A.to(dtype), B.to(dtype)
    if kind == "started":
        return Factors(A, B, 0.7, A + A.abs().mean() / 8, B * 0.5)
    return Factors(A, B, 0.7)


def dense(f: Factors) -> NDArray[np.float64]:
    def wide(t: torch.Tensor) -> NDArray[np.float64]:
        return t.double().numpy()

    product = wide(f.B) @ wide(f.A)
    if f.A0 is not None and f.B0 is not None:
        product = product - wide(f.B0) @ wide(f.A0)
    return f.scale * product


@given(sizes, sizes, sizes, seeds, dtypes, kinds)
def test_every_number_is_numpys(
    out: int, inside: int, r: int, seed: int, dtype: torch.dtype, kind: str
) -> None:
    factors = made(out, inside, r, seed, dtype, kind)
    matrix = dense(factors)
    wanted = np.linalg.svd(matrix, compute_uv=False)
    found = spectrum(factors)
    tiny = 1e-12 * max(1.0, wanted[0])
    values = np.zeros_like(wanted)
    values[: min(len(wanted), len(found.values))] = found.values[: len(wanted)]
    np.testing.assert_allclose(values, wanted, atol=tiny)
    assert found.rank == np.linalg.matrix_rank(matrix, tol=1e-9)
    assert found.norm == pytest.approx(np.linalg.norm(matrix), abs=tiny)
    if not found.rank:
        assert (found.stable_rank, found.entropy_rank, found.holding(0.9)) == (0, 0, 0)
        return
    assert found.stable_rank == pytest.approx((wanted**2).sum() / wanted[0] ** 2)
    p = values[values > tiny] / values.sum()
    assert found.entropy_rank == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-6)
    for k in range(len(found.values) + 1):
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        rest = matrix - (u[:, :k] * s[:k]) @ vh[:k]
        assert found.tail(k) == pytest.approx(np.linalg.norm(rest), abs=10 * tiny)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.01, 1))
def test_the_ranks_held_are_the_fewest(values: list[float], share: float) -> None:
    ordered = np.sort(values)[::-1]
    found = Spectrum(tuple(ordered.tolist()))
    k = found.holding(share)
    whole = (ordered**2).sum()
    assert (ordered[:k] ** 2).sum() >= (share - 2e-12) * whole
    assert (ordered[: k - 1] ** 2).sum() < (share + 1e-11) * whole
    assert 1 <= k <= len(values)


def test_a_bank_is_cut_together() -> None:
    A, B = torch.randn(3, 4, 9).double(), torch.randn(3, 7, 4).double()
    each = [np.linalg.svd((b @ a).numpy(), compute_uv=False)[:4] for a, b in zip(A, B, strict=True)]
    found = spectrum(Factors(A, B, 1.0))
    np.testing.assert_allclose(found.values, np.sqrt((np.stack(each) ** 2).sum(axis=0)))


@pytest.mark.parametrize(
    ("values", "k", "ratio"),
    [((5.0, 4.0, 0.1, 0.09), 2, 40.0), ((1.0, 0.5), 1, 2.0), ((3.0, 3.0, 0.0), 2, None)],
)
def test_the_gap_is_the_largest_step_down(
    values: tuple[float, ...], k: int, ratio: float | None
) -> None:
    gap = Spectrum(values).gap
    assert gap is not None
    assert gap.k == k
    assert gap.ratio == pytest.approx(ratio) if ratio else gap.ratio > 1e15


@pytest.mark.parametrize("values", [(), (1.0,), (0.0, 0.0)])
def test_there_is_no_gap_where_no_step_is_seen(values: tuple[float, ...]) -> None:
    assert Spectrum(values).gap is None


def test_very_large_and_very_small_values_neither_overflow_nor_vanish() -> None:
    for size in (1e200, 1e-200):
        found = Spectrum((3 * size, 4 * size / 4))
        assert found.norm == pytest.approx(10**0.5 * size)
        assert found.stable_rank == pytest.approx(10 / 9)


@pytest.mark.parametrize("values", [(float("nan"),), (1.0, -1.0), (float("inf"),), (1.0, 2.0)])
def test_values_that_are_no_spectrum_are_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="Singular values must"):
        Spectrum(values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(bad: float) -> None:
    B = torch.ones(3, 2)
    B[1, 1] = bad
    with pytest.raises(UserError, match="not finite"):
        spectrum(Factors(torch.ones(2, 3), B, 1.0))


@pytest.mark.parametrize(
    ("share", "kept", "lost"),
    [
        (0, False, True),
        (1e-9, True, True),
        (0.5, True, True),
        (1, True, False),
        (1.01, False, False),
    ]
    + [(wrong, False, False) for wrong in (-0.1, math.nan, math.inf, True, "0.5", None)],
)
def test_a_share_that_is_kept_may_be_all_and_one_that_is_lost_none(
    share: object, kept: bool, lost: bool
) -> None:
    assert ([*share_problems("energy", share)] == []) is kept
    assert ([*share_problems("error", share, zero=True)] == []) is lost
    for problem in share_problems("energy", share):
        assert problem == f"energy must be a number above 0 and at most 1, got {share!r}."
