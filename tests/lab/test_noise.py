"""The rule of the noise, against SciPy's tests where one applies, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from rankwise.lab.noise import LEVEL, Noise, Term, combine, holm, interval_of_seeds


def term(weight, values):
    """A score that is the mean of its rows."""
    return Term(weight, values, values.mean(axis=0))


def test_one_seed_is_the_paired_t_test_over_the_rows():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 40, 1)) + np.array([0.0, 0.4])[:, None, None]
    noise = combine([term(1.0, one), term(-1.0, two)])
    wanted = stats.ttest_rel(one[:, 0], two[:, 0])
    assert noise.p(one.mean() - two.mean()) == pytest.approx(wanted.pvalue)
    low, high = wanted.confidence_interval(0.95)
    assert noise.half_width() == pytest.approx((high - low) / 2)


def test_rows_without_a_spread_are_welchs_test_over_the_seeds():
    rng = np.random.default_rng(1)
    one, two = (np.tile(rng.normal(0, s, size=k), (50, 1)) for s, k in ((1.0, 3), (2.0, 5)))
    noise = combine([term(1.0, one), term(-1.0, two)])
    wanted = stats.ttest_ind(one[0], two[0], equal_var=False)
    assert noise.p(one.mean() - two.mean()) == pytest.approx(wanted.pvalue)
    assert noise.degrees == pytest.approx(wanted.df)


def test_right_and_wrong_answers_are_mcnemars_test_up_to_its_own_centring():
    """McNemar's statistic has Σd² where the t-test has Σ(d − mean)²."""
    n, b, c = 5000, 130, 90
    one, two = np.zeros((2, n, 1))
    one[:b], two[b : b + c] = 1, 1
    noise = combine([term(1.0, one), term(-1.0, two)])
    mcnemar = stats.chi2.sf((b - c) ** 2 / (b + c), 1)
    assert noise.p(one.mean() - two.mean()) == pytest.approx(mcnemar, rel=0.01)


def draws(rng, n, seeds, spread, difficulty):
    """Right and wrong answers of one method: rows have their difficulty, seeds their luck."""
    own = difficulty + rng.normal(size=n) * 0.3
    lucky = rng.normal(size=seeds) * spread
    return (own[:, None] + lucky + rng.normal(size=(n, seeds)) * 0.7 > 0).astype(float)


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (3, 0.2), (5, 0.2)])
def test_methods_that_are_alike_are_rarely_told_apart(seeds, spread):
    rng = np.random.default_rng(2)
    tries, claims = 600, 0
    for _ in range(tries):
        difficulty = rng.normal(size=300) * 1.5 + 1
        one, two = (draws(rng, 300, seeds, spread, difficulty) for _ in range(2))
        noise = combine([term(1.0, one), term(-1.0, two)])
        claims += noise.p(one.mean() - two.mean()) <= LEVEL
    assert claims / tries < LEVEL + 2 * math.sqrt(LEVEL * (1 - LEVEL) / tries)


def test_a_difference_of_a_few_points_is_seen():
    rng = np.random.default_rng(3)
    difficulty = rng.normal(size=800) * 1.5 + 1
    one, two = (draws(rng, 800, 3, 0.02, difficulty + shift) for shift in (0.0, 0.4))
    noise = combine([term(1.0, one), term(-1.0, two)])
    assert noise.p(one.mean() - two.mean()) < 1e-4
    unpaired = math.hypot(*(combine([term(1.0, x)]).standard_error for x in (one, two)))
    assert noise.standard_error < 0.7 * unpaired


def test_what_never_differs_has_no_noise():
    same = np.ones((10, 2))
    noise = combine([term(1.0, same), term(-1.0, same)])
    assert noise == Noise(0.0, math.inf)
    assert noise.p(0.0) == 1.0
    assert noise.half_width() == 0.0
    assert combine([term(1.0, np.ones((1, 3)))]) is None


def test_the_interval_over_seeds_is_students():
    scores = [0.70, 0.74, 0.73]
    low, high = stats.t.interval(0.95, 2, np.mean(scores), stats.sem(scores))
    assert interval_of_seeds(scores) == pytest.approx((high - low) / 2)
    assert interval_of_seeds([0.7]) is None
    assert interval_of_seeds([0.7, 0.7]) == 0.0


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, 0.9]) == pytest.approx([0.4, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_rejects_what_its_steps_reject():
    """Step down: the k-th smallest of m against level / (m − k + 1), until one does not pass."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        p = (rng.random(7) ** 3).tolist()
        rejected = set()
        for k, index in enumerate(np.argsort(p)):
            if p[index] > LEVEL / (7 - k):
                break
            rejected.add(int(index))
        assert {i for i, q in enumerate(holm(p)) if q <= LEVEL} == rejected
