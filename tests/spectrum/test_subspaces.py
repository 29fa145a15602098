"""Subspace similarity and amplification, by the paper's formulas on dense matrices in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankwise.errors import UserError
from rankwise.lowrank import Factors
from rankwise.spectrum import amplification, chance, directions, similarity


def random(out: int, inside: int, r: int) -> Factors:
    return Factors(torch.randn(r, inside), torch.randn(out, r), 0.5)


def test_directions_are_those_of_the_dense_matrix() -> None:
    factors = random(9, 7, 3)
    found = directions(factors)
    rebuilt = found.left @ torch.diag(found.values) @ found.right.mT
    torch.testing.assert_close(rebuilt, factors.delta().double(), rtol=1e-5, atol=1e-6)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found.left.mT @ found.left, eye)
    torch.testing.assert_close(found.right.mT @ found.right, eye)


def test_similarity_is_the_papers_formula() -> None:
    first, second = directions(random(9, 20, 4)).right, directions(random(9, 20, 6)).right
    found = similarity(first, second)
    assert found.shape == (4, 6)
    for i in range(1, 5):
        for j in range(1, 7):
            product = first[:, :i].numpy().T @ second[:, :j].numpy()
            wanted = np.linalg.norm(product) ** 2 / min(i, j)
            assert found[i - 1, j - 1].item() == pytest.approx(wanted)


def test_the_same_space_is_one_and_an_orthogonal_one_zero() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    assert similarity(eye[:, :3], eye[:, :5])[2].tolist() == pytest.approx([1, 1, 1, 1, 1])
    assert similarity(eye[:, :3], eye[:, 3:5]).abs().max() == 0


def test_chance_is_the_mean_over_random_spaces() -> None:
    draws = [
        similarity(directions(random(5, 30, 3)).right, directions(random(5, 30, 4)).right)[-1, -1]
        for _ in range(300)
    ]
    assert torch.stack(draws).mean().item() == pytest.approx(chance(3, 4, 30), rel=0.1)


def test_spaces_of_different_size_are_refused() -> None:
    with pytest.raises(UserError, match="30 and 20"):
        similarity(torch.eye(30)[:, :2], torch.eye(20)[:, :2])


def test_amplification_is_the_papers_formula() -> None:
    factors, weight = random(9, 7, 3), torch.randn(9, 7)
    delta = factors.delta().double().numpy()
    u, _, vh = np.linalg.svd(delta)
    below = np.linalg.norm(u[:, :3].T @ weight.double().numpy() @ vh[:3].T)
    found = amplification(directions(factors), weight)
    assert found == pytest.approx(np.linalg.norm(delta) / below, rel=1e-5)


def test_an_update_along_w0_is_amplified_by_its_own_size() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight)
    along = Factors(vh[:2], u[:, :2] * s[:2], 3.0)
    assert amplification(directions(along), weight) == pytest.approx(3)


def test_a_zero_update_has_neither_directions_nor_amplification() -> None:
    zero = directions(Factors(torch.randn(2, 5), torch.zeros(4, 2), 1.0))
    assert zero.values.numel() == 0
    assert amplification(zero, torch.randn(4, 5)) is None


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"W0 is \(5, 4\)"):
        amplification(directions(random(4, 5, 2)), torch.randn(5, 4))
