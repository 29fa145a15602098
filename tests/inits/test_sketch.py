"""The sketch of a stream of rows against numpy's decomposition of all of them at once."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from rankwise.inits.sketch import Sketch


def stream(seed: int, sizes: list[int], inside: int, decay: float = 1.0) -> list[Tensor]:
    """Batches of rows with a mean, whose directions have falling variances."""
    made = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(inside, inside, dtype=torch.float64, generator=made)).Q
    size = decay ** torch.arange(inside, dtype=torch.float64)
    return [
        (torch.randn(n, inside, dtype=torch.float64, generator=made) * size) @ turn + 3.0
        for n in sizes
    ]


def sketched(batches: list[Tensor], width: int) -> Sketch:
    sketch = Sketch.empty(batches[0])
    for batch in batches:
        sketch = sketch.updated(batch, width)
    return sketch


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    inside=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_with_room_for_all_it_is_exact(sizes: list[int], inside: int, seed: int):
    batches = stream(seed, sizes, inside)
    sketch = sketched(batches, width=inside)
    rows = torch.cat(batches).numpy()
    centred = rows - rows.mean(0)
    assert sketch.count == len(rows)
    np.testing.assert_allclose(sketch.mean, rows.mean(0))
    np.testing.assert_allclose(sketch.rows.T @ sketch.rows, centred.T @ centred, atol=1e-9)
    assert sketch.total == pytest.approx((centred**2).sum(), abs=1e-9)


def test_its_directions_are_the_principal_ones_and_their_shares_of_the_variance():
    batches = stream(1, [40, 25, 60], 20, decay=0.8)
    directions, shares = sketched(batches, width=12).directions()
    rows = torch.cat(batches).numpy()
    _, sigma, vh = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    cosines = np.abs((directions[:6].numpy() * vh[:6]).sum(1))
    assert cosines.min() > 0.999
    np.testing.assert_allclose(shares[:6], sigma[:6] ** 2 / (sigma**2).sum(), rtol=1e-3)
    torch.testing.assert_close(directions @ directions.T, torch.eye(12, dtype=torch.float64))


def test_memory_is_bounded():
    sketch = sketched(stream(2, [50] * 6, 30), width=5)
    assert sketch.rows.shape == (5, 30)


def test_directions_without_variance_are_left_out():
    rows = torch.zeros(9, 6)
    rows[:, 2] = torch.arange(9.0)
    rows += 1e3 * torch.randn(6)  # a mean whose rounding is no direction
    directions, shares = sketched([rows[:4], rows[4:]], width=6).directions()
    assert directions.abs().round(decimals=4).tolist() == [[0, 0, 1, 0, 0, 0]]
    assert shares.tolist() == [pytest.approx(1)]


def test_constant_rows_have_no_direction():
    rows = (1e3 * torch.rand(40)).expand(77, 40)  # whose mean is rounded, and is not the row
    assert (rows - rows.mean(0)).any()
    directions, shares = sketched([rows, rows[:13]], width=4).directions()
    assert directions.shape == (0, 40)
    assert shares.shape == (0,)


def test_it_is_the_same_each_time_and_draws_nothing():
    before = torch.get_rng_state()
    first, again = (sketched(stream(3, [50, 40], 60), width=4).rows for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
