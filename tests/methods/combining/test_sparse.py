"""TIES, DARE and pruning: numpy does the papers' steps on dense updates, and PEFT is measured."""

import weakref
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
from rankwise.methods.combining.sparse import DARE, TIES, Magnitude, Majority
from rankwise.methods.combining.sums import SVD, Combination

FULL = 99  # a rank that cuts nothing


@st.composite
def updates(draw: st.DrawFn) -> list[Factors]:
    """One to four updates of one weight, in float64 so that numpy ranks entries the same."""
    out, inside = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    make = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weights = draw(st.lists(st.sampled_from([1.0, 1.0, 0.4, 2.0, -0.7]), min_size=1, max_size=4))
    return [
        Factors(
            torch.randn(2, inside, generator=make, dtype=torch.float64),
            torch.randn(out, 2, generator=make, dtype=torch.float64),
            weight,
        )
        for weight in weights
    ]


def drawn(ranks: Sequence[int], out: int = 24, inside: int = 30) -> list[Factors]:
    return [Factors(torch.randn(r, inside), torch.randn(out, r), 1.0) for r in ranks]


def dense(factors: Factors) -> np.ndarray:
    """δ by numpy alone."""
    return factors.scale * (factors.B.double().numpy() @ factors.A.double().numpy())


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    """The largest entries in absolute value, by sorting."""
    kept = max(1, round(density * delta.size))
    order = np.argsort(np.abs(delta), axis=None)
    result = np.zeros(delta.size)
    result[order[-kept:]] = delta.flatten()[order[-kept:]]
    return result.reshape(delta.shape)


def ties(deltas: Sequence[np.ndarray], *, frequency: bool = False) -> np.ndarray:
    """The paper's election and disjoint mean, entry by entry."""
    result = np.zeros(deltas[0].shape)
    for place in np.ndindex(*result.shape):
        values = [float(d[place]) for d in deltas]
        votes = sum(np.sign(values)) if frequency else 0.0
        sign = np.sign(votes or sum(values))
        agreeing = [v for v in values if v != 0 and np.sign(v) == sign]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-7 * (1 + np.abs(wanted).max()))


# --- what the papers say -------------------------------------------------------------------------


@given(parts=updates(), density=st.floats(0.05, 1.0))
def test_magnitude_sums_the_largest_entries_of_each_update(parts: list[Factors], density: float):
    joined = Magnitude(density, r=FULL).join(parts, "layer")
    close(dense(joined.factors), sum(trimmed(dense(p), density) for p in parts))


@given(parts=updates(), density=st.floats(0.05, 1.0), frequency=st.booleans())
def test_ties_is_the_papers_trim_elect_and_disjoint_mean(parts, density: float, frequency: bool):
    majority = Majority.FREQUENCY if frequency else Majority.TOTAL
    joined = TIES(density, r=FULL, majority=majority).join(parts, "layer")
    wanted = ties([trimmed(dense(p), density) for p in parts], frequency=frequency)
    close(dense(joined.factors), wanted)


def test_the_two_majorities_differ_where_many_small_ones_stand_against_a_large_one():
    parts = [Factors(torch.ones(1, 1), torch.tensor([[v]]), 1.0) for v in (-1.0, -2.0, 9.0)]
    assert dense(TIES(1.0).join(parts, "x").factors).item() == pytest.approx(9.0)
    by_count = TIES(1.0, majority=Majority.FREQUENCY).join(parts, "x")
    assert dense(by_count.factors).item() == pytest.approx(-1.5)


@given(parts=updates(), how=st.sampled_from([TIES(0.5, FULL), DARE(0.5, 3, FULL, ties=True)]))
def test_the_opposite_updates_give_the_opposite_result(parts: list[Factors], how: Combination):
    turned = [Factors(p.A, p.B, -p.scale) for p in parts]
    close(dense(how.join(turned, "x").factors), -dense(how.join(parts, "x").factors))


@given(parts=updates())
@settings(max_examples=30)
def test_with_nothing_dropped_pruning_and_dare_are_the_plain_sum(parts: list[Factors]):
    for how in (Magnitude(1.0, r=FULL), DARE(1.0, r=FULL)):
        joined = how.join(parts, "layer")
        close(dense(joined.factors), sum(dense(p) for p in parts))
        assert joined.shift.lost <= 1e-7 * sum(np.linalg.norm(dense(p)).item() for p in parts)


# --- chance --------------------------------------------------------------------------------------


def test_dare_drops_as_many_as_it_says_and_rescales_the_rest():
    [part] = drawn([4], 200, 100)
    found = dense(DARE(0.3, seed=7, r=FULL + 1).join([part], "layer").factors)
    spared = np.abs(found) > 1e-3 * np.abs(dense(part)).clip(min=1e-2)
    assert spared.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 20_000))
    np.testing.assert_allclose(found[spared], (dense(part) / 0.3)[spared], rtol=0.02, atol=1e-3)


def test_dare_is_the_plain_sum_on_average():
    parts = drawn([2, 2], 8, 9)
    wanted = sum(dense(p) for p in parts)
    runs = [dense(DARE(0.5, seed=s, r=FULL).join(parts, "x").factors) for s in range(400)]
    spread = np.sqrt(sum(dense(p) ** 2 for p in parts) / 400)  # (1/d − 1) δ² / runs, d = 1/2
    assert np.abs((np.mean(runs, axis=0) - wanted) / spread).max() < 4.5


def test_what_dare_drops_depends_on_seed_name_and_place_alone():
    one, two = drawn([2, 2])
    how = DARE(0.5, seed=1, r=FULL)

    def dropped(joined_by: DARE, parts: list[Factors], name: str) -> np.ndarray:
        return np.abs(dense(joined_by.join(parts, name).factors)) < 1e-5

    same = dropped(how, [one], "a")
    assert np.array_equal(same, dropped(DARE(0.5, seed=1, r=FULL), [two], "a"))
    assert not np.array_equal(same, dropped(DARE(0.5, seed=2, r=FULL), [one], "a"))
    assert not np.array_equal(same, dropped(how, [one], "b"))
    both = dropped(how, [one, two], "a")
    assert both.mean() == pytest.approx(0.25, abs=0.07)  # the two masks are drawn apart


def test_dare_with_ties_elects_among_what_chance_spared():
    parts = drawn([2, 2], 12, 10)
    spared = [dense(DARE(0.5, 0, FULL).join(p, "x").factors) for p in ([parts[0]], [parts[1]])]
    found = dense(DARE(0.5, 0, FULL, ties=True).join(parts, "x").factors)
    plain = dense(DARE(0.5, 0, FULL).join(parts, "x").factors)
    second = plain - spared[0]  # what the second gave: its mask is of its own place
    noise = 1e-4
    clean = [np.where(np.abs(d) < noise, 0.0, d) for d in (spared[0], second)]
    np.testing.assert_allclose(found, ties(clean), atol=noise)


# --- rank, error, banks and memory ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (1, 7), (7, 1)])
@pytest.mark.parametrize("r", [1, 3, FULL])
def test_the_result_is_the_best_of_its_rank_and_its_error_is_measured(shape, r: int):
    parts = drawn([2, 3], *shape)
    wanted = sum(trimmed(dense(p), 0.4) for p in parts)
    joined = Magnitude(0.4, r=r).join(parts, "layer")
    sigma = np.linalg.svd(wanted, compute_uv=False)
    k = min(r, *shape)
    size = np.linalg.norm(wanted)
    lost = np.linalg.norm(wanted - dense(joined.factors))
    assert (joined.factors.r, joined.factors.scale) == (k, 1.0)
    assert (joined.factors.B.norm(dim=0).diff() <= 1e-6).all()  # the largest come first
    assert lost == pytest.approx(np.sqrt((sigma[k:] ** 2).sum()), rel=1e-6, abs=1e-6 * size)
    assert joined.cut.wanted == pytest.approx(size, rel=1e-6)
    assert joined.cut.lost == pytest.approx(lost, rel=1e-4, abs=1e-6 * size)
    plain = sum(dense(p) for p in parts)
    assert joined.shift.wanted == pytest.approx(np.linalg.norm(plain), rel=1e-6)
    shift = np.linalg.norm(plain - dense(joined.factors))
    assert joined.shift.lost == pytest.approx(shift, rel=1e-6)


def test_without_a_rank_it_is_the_largest_of_the_updates():
    for how in (Magnitude(0.5), TIES(0.5), DARE(0.5)):
        assert how.join(drawn([2, 5, 3]), "layer").factors.r == 5


def test_each_weight_of_a_bank_is_done_for_itself():
    parts = [Factors(torch.randn(3, 2, 7), torch.randn(3, 9, 2), w) for w in (1.0, -0.5)]
    for how in (Magnitude(0.3), TIES(0.3)):
        joined = how.join(parts, "experts")
        singles = [
            how.join([Factors(p.A[e], p.B[e], p.scale) for p in parts], "one") for e in range(3)
        ]
        for e, single in enumerate(singles):
            close(dense(joined.factors)[e], dense(single.factors))
        assert joined.cut.lost == pytest.approx(np.hypot.reduce([s.cut.lost for s in singles]))
        assert joined.shift.lost == pytest.approx(np.hypot.reduce([s.shift.lost for s in singles]))
    dropped = np.abs(dense(DARE(0.5, r=FULL).join(parts[:1], "experts").factors)) < 1e-5
    assert not np.array_equal(dropped[0], dropped[1])


def test_a_zero_update_is_joined_without_nan():
    zero = Factors(torch.randn(2, 6), torch.zeros(5, 2), 1.0)
    for how in (Magnitude(0.5), TIES(0.5), DARE(0.5)):
        joined = how.join([zero, zero], "layer")
        assert not dense(joined.factors).any()
        assert joined.cut.error == 0.0


@pytest.mark.parametrize("shape", [(300, 5), (5, 300)])
def test_the_square_that_is_made_is_that_of_the_shorter_side(shape: tuple[int, int]):
    with Sizes() as seen:
        TIES(0.5).join(drawn([2, 2], *shape), "layer")
    assert max(seen.sizes) <= 2 * 1500


class Sizes(TorchDispatchMode):
    """Notes the size of every tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes.extend(t.numel() for t in filter(is_tensor, tree_leaves(result)))
        return result


class Live(TorchDispatchMode):
    """The most memory, in matrices of a size, that lives at once inside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.now, self.peak = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if tensor.numel() >= self.size and storage._cdata not in known:
                self.now += 1
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor, self._gone)
        return result

    def _gone(self) -> None:
        self.now -= 1


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def test_memory_does_not_grow_with_the_number_of_updates():
    def peak(how: Combination, count: int) -> int:
        parts = drawn([2] * count, 100, 90)
        with Live(100 * 90) as live:
            how.join(parts, "layer")
        return live.peak

    for how in (Magnitude(0.5), TIES(0.5), DARE(0.5, ties=True)):
        assert 2 <= peak(how, 3) == peak(how, 9) <= 8


# --- PEFT ----------------------------------------------------------------------------------------


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return np.linalg.norm(found - wanted).item() / np.linalg.norm(wanted).item()


def test_with_equal_weights_and_full_rank_ties_is_what_peft_makes_of_dense_updates():
    from peft.utils import merge_utils

    parts = drawn([4, 4, 4])
    deltas = [torch.from_numpy(dense(p)) for p in parts]
    theirs = merge_utils.ties(deltas, torch.ones(3), density=0.2).numpy()
    close(dense(TIES(0.2, r=FULL).join(parts, "layer").factors), theirs)
    theirs = merge_utils.magnitude_prune(deltas, torch.ones(3), density=0.2).numpy()
    close(dense(Magnitude(0.2, r=FULL).join(parts, "layer").factors), theirs)


@pytest.mark.parametrize("name", ["ties", "magnitude_prune", "dare_linear"])
def test_at_one_rank_ours_is_nearer_to_what_the_paper_means_than_peft_on_a_and_b(name: str):
    from peft.utils import merge_utils

    r, density = 8, 0.5
    parts = drawn([r, r], 64, 64)
    deltas = [dense(p) for p in parts]
    if name == "ties":
        wanted = ties([trimmed(d, density) for d in deltas])
        ours = TIES(density, r).join(parts, "layer")
    elif name == "magnitude_prune":
        wanted = sum(trimmed(d, density) for d in deltas)
        ours = Magnitude(density, r).join(parts, "layer")
    else:  # what DARE aims at is the sum
        wanted = sum(deltas)
        ours = DARE(density, r=r).join(parts, "layer")
    merge = getattr(merge_utils, name)
    a = merge([p.A for p in parts], torch.ones(2), density)
    b = merge([p.B for p in parts], torch.ones(2), density)
    assert relative(dense(ours.factors), wanted) < 0.8
    assert relative(dense(Factors(a, b, 1.0)), wanted) > 1.0  # further than no update at all


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Magnitude, TIES, DARE])
@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan"), True, None, "0.5"])
def test_a_density_that_is_none_is_refused(make: type, density: object):
    with pytest.raises(UserError, match="density must be a number above 0 and at most 1, got"):
        make(density)


@pytest.mark.parametrize("make", [Magnitude, TIES, DARE, lambda _, r: SVD(r)])
def test_a_rank_that_is_none_is_refused(make: type):
    with pytest.raises(UserError, match="r must be a whole number of 1 or more, or None, got 0"):
        make(0.5, r=0)


@pytest.mark.parametrize("seed", [-1, 1.0, True, None])
def test_a_seed_that_is_none_is_refused(seed: object):
    with pytest.raises(UserError, match="DARE: seed must be a whole number of 0 or more, got"):
        DARE(0.5, seed=seed)  # type: ignore[arg-type]
