"""Teachers, inputs and bounds, against NumPy on routes of its own."""

import numpy as np
import pytest

from rankwise.lab.theory.problems import (
    Problem,
    best_update,
    excess,
    sample,
    slanted,
    spectra,
    tail,
    teacher,
)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_spectra_fall_and_have_the_same_size():
    kinds = spectra(8)
    assert list(kinds) == ["exact rank", "power law", "exponential", "flat"]
    for values in kinds.values():
        assert np.all(np.diff(values) <= 0)
        assert np.sum(values**2) == pytest.approx(1)
    assert np.count_nonzero(kinds["exact rank"]) == 2
    assert kinds["power law"][0] / kinds["power law"][3] == pytest.approx(4)
    steps = kinds["exponential"][1:] / kinds["exponential"][:-1]
    assert np.allclose(steps, steps[0])
    assert np.ptp(kinds["flat"]) == 0


def test_a_teacher_differs_from_the_base_by_the_singular_values_asked_for(random):
    values = np.array([3.0, 2.0, 0.5, 0.0])
    made = teacher("t", values, 6, 4, random)
    assert made.W0.shape == made.W.shape == (6, 4)
    np.testing.assert_allclose(np.linalg.svd(made.delta, compute_uv=False), values, atol=1e-14)
    np.testing.assert_allclose(made.y, made.x @ made.W.T)
    np.testing.assert_allclose(made.wanted, made.delta.T, atol=1e-14)


def test_slanted_inputs_have_the_eigenvalues_asked_for(random):
    root = slanted(5, 16.0, random)
    np.testing.assert_allclose(root, root.T)
    values = np.linalg.eigvalsh(root @ root)
    assert values[-1] / values[0] == pytest.approx(16)
    assert values.mean() == pytest.approx(1)


def test_the_tail_is_what_truncation_leaves(random):
    matrix = random.standard_normal((7, 5))
    gram = np.linalg.eigvalsh(matrix.T @ matrix)  # rising: another route to the squares
    assert len(tail(matrix)) == 6
    for r in range(6):
        assert tail(matrix)[r] == pytest.approx(gram[: 5 - r].sum(), abs=1e-12)


def test_the_loss_of_slanted_rows_is_the_expected_loss(random):
    root = slanted(4, 9.0, random)
    made = teacher("t", np.array([2.0, 1.0]), 3, 4, random, root)
    update = random.standard_normal((3, 4))
    x = random.standard_normal((200_000, 4)) @ root
    mean = np.mean(np.sum((x @ (made.delta - update).T) ** 2, axis=1))
    loss, weights = excess(made, update)
    assert loss == pytest.approx(mean, rel=0.02)
    assert loss == pytest.approx(np.sum((made.y - made.x @ (made.W0 + update).T) ** 2))
    assert weights == pytest.approx(np.linalg.norm(made.delta - update) ** 2)


def test_reduced_rank_regression_is_the_projection_on_the_outputs_that_vary_most(random):
    made = teacher("t", np.array([3.0, 2.0, 1.0, 0.5]), 5, 4, random, slanted(4, 50.0, random))
    _, directions = np.linalg.eigh(made.delta @ made.x.T @ made.x @ made.delta.T)
    for r in range(1, 5):
        kept = directions[:, -r:]
        update = best_update(made, r)
        np.testing.assert_allclose(update, kept @ kept.T @ made.delta, atol=1e-12)
        assert np.linalg.matrix_rank(update, tol=1e-9) == r
        assert excess(made, update)[0] == pytest.approx(tail(made.wanted)[r], abs=1e-12)


def test_nothing_of_the_rank_does_better_than_reduced_rank_regression(random):
    made = teacher("t", np.array([3.0, 2.0, 1.0]), 5, 4, random, slanted(4, 50.0, random))
    u, values, vt = np.linalg.svd(best_update(made, 2), full_matrices=False)
    least = excess(made, best_update(made, 2))[0]
    left, right = u[:, :2] * values[:2], vt[:2]
    for _ in range(50):
        near = 0.1 * random.standard_normal((5, 2)), 0.1 * random.standard_normal((2, 4))
        assert excess(made, (left + near[0]) @ (right + near[1]))[0] > least


def test_few_rows_stand_for_all_samples():
    truth = teacher("t", np.array([1.0, 0.5]), 3, 4, np.random.default_rng(1))
    made = sample(truth, 30, 0.3, np.random.default_rng(2))
    again = np.random.default_rng(2)
    x = again.standard_normal((30, 4))
    y = x @ truth.W.T + 0.3 * again.standard_normal((30, 3))

    def mean_loss(update):
        return np.mean(np.sum((y - x @ (truth.W0 + update).T) ** 2, axis=1))

    def loss(problem: Problem, update):
        return np.sum((problem.y - problem.x @ (problem.W0 + update).T) ** 2)

    assert made.x.shape == (4, 4)
    updates = np.random.default_rng(3).standard_normal((5, 3, 4))
    apart = [mean_loss(update) - loss(made, update) for update in updates]
    np.testing.assert_allclose(apart, apart[0])  # what no update changes
    plain = np.linalg.lstsq(x, y, rcond=None)[0].T - truth.W0
    np.testing.assert_allclose(best_update(made, 3), plain, atol=1e-12)
