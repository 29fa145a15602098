"""The nearest update of a rank to a dense change, against NumPy; what is lost is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.spectrum import difference
from rankwise.spectrum.difference import (
    chance_held,
    frobenius,
    nearest,
    rounding_norm,
    subtract,
)


def low(out: int, inside: int, k: int, noise: float = 0.0) -> torch.Tensor:
    left, right = torch.randn(out, k), torch.randn(k, inside)
    return left @ right / k + noise * torch.randn(out, inside)


@given(st.integers(1, 15), st.integers(1, 15), st.integers(1, 20), st.integers(0, 99))
def test_no_update_of_the_rank_is_nearer(out: int, inside: int, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    delta = torch.randn(out, inside, dtype=torch.float64)
    found = nearest(delta, r=r)
    s = np.linalg.svd(delta.numpy(), compute_uv=False)
    k = min(r, out, inside)
    assert found.factors.r == k
    assert found.exact
    assert found.norm == pytest.approx(np.linalg.norm(delta.numpy()))
    assert found.lost == pytest.approx(np.sqrt((s[k:] ** 2).sum()), abs=1e-5)
    assert found.lost == pytest.approx((delta - found.factors.delta()).norm().item(), abs=1e-5)


@given(st.floats(0.05, 1), st.integers(0, 99))
def test_energy_takes_the_fewest_ranks(energy: float, seed: int) -> None:
    torch.manual_seed(seed)
    delta = torch.randn(9, 12)
    held = np.cumsum(np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2)
    wanted = int((held < energy * held[-1] * (1 - 1e-9)).sum()) + 1
    assert nearest(delta, energy=energy).factors.r == min(wanted, 9)
    assert nearest(delta, energy=energy, r=2).factors.r == min(wanted, 2)


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (12, 12)])
@pytest.mark.parametrize("rank", [3, 12])
def test_a_few_rows_at_a_time_give_the_same(
    shape: tuple[int, int], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = low(*shape, rank)
    whole, norm, rounding = nearest(delta, r=5), frobenius(delta), rounding_norm(delta.half())
    monkeypatch.setattr(difference, "_SLAB", 20)
    parts = nearest(delta, r=5)
    torch.testing.assert_close(parts.factors.delta(), whole.factors.delta())
    assert parts.norm == pytest.approx(whole.norm)
    assert parts.lost == pytest.approx(whole.lost, abs=1e-6 * whole.norm)
    assert parts.exact
    assert frobenius(delta) == pytest.approx(norm)
    assert norm == pytest.approx(np.linalg.norm(delta.numpy()))
    assert rounding_norm(delta.half()) == pytest.approx(rounding)
    assert torch.equal(subtract(delta.bfloat16(), delta), delta.bfloat16().float() - delta)


def test_so_much_of_a_large_change_that_half_its_ranks_are_needed_is_found_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delta = torch.randn(90, 120)
    monkeypatch.setattr(difference, "EXACT", 10)
    found = nearest(delta, energy=0.9)
    held = np.cumsum(np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2)
    assert found.exact
    assert found.factors.r == int((held < 0.9 * held[-1]).sum()) + 1 > 45


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_randomised_search_is_nearly_as_near_and_says_how_near(
    noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = low(300, 200, 5, noise)
    exact = nearest(delta, r=5)
    monkeypatch.setattr(difference, "EXACT", 10)
    draw = torch.Generator().manual_seed(1)
    found = nearest(delta, r=5, generator=draw)
    assert not found.exact
    A, B = found.factors.A.double(), found.factors.B.double()
    real = (delta.double() - B @ A).norm().item()
    assert found.lost == pytest.approx(real, rel=1e-9)
    assert found.lost <= exact.lost * 1.001 + 1e-4 * found.norm
    again = nearest(delta, r=5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.factors.A, found.factors.A)


def test_a_randomised_search_widens_until_it_holds_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "EXACT", 10)
    found = nearest(low(300, 200, 60), energy=0.99)
    assert 32 < found.factors.r <= 60
    assert found.held >= 0.99 - 1e-6
    assert nearest(low(300, 200, 60), energy=0.99, r=40).factors.r == 40


def test_no_change_holds_all_of_itself() -> None:
    found = nearest(torch.zeros(4, 5), r=2)
    assert (found.norm, found.lost, found.held) == (0, 0, 1)


def test_chance_is_what_a_random_matrix_holds() -> None:
    held = [nearest(torch.randn(200, 300), r=4).held for _ in range(5)]
    assert np.mean(held) == pytest.approx(chance_held(200, 300, 4), rel=0.1)
    assert max(held) <= chance_held(200, 300, 4) * 1.02
    assert chance_held(4, 4, 4) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_as_large_as_it_is(dtype: torch.dtype) -> None:
    weight = torch.randn(200, 300)
    weight[0, 0] = 0
    short = weight.to(dtype)
    assert rounding_norm(short) == pytest.approx((weight - short.float()).norm().item(), rel=0.02)
    assert rounding_norm(weight) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [({}, "r or energy"), ({"r": 0}, "whole number"), ({"energy": 1.5}, "at most 1")],
)
def test_what_makes_no_sense_is_refused(options: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        nearest(torch.ones(2, 2), **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not finite"):
        nearest(torch.full((2, 2), float("nan")), r=1)
