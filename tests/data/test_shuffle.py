"""Orders that are the same everywhere."""

from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.shuffle import permutation


@given(st.integers(0, 200), st.integers(), st.text(max_size=5))
def test_it_is_a_permutation_set_by_its_seed(n, seed, word):
    order = permutation(n, seed, word)
    assert sorted(order) == list(range(n))
    assert permutation(n, seed, word) == order


def test_other_seeds_give_other_orders():
    orders = [permutation(50, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_the_order_is_written_down():
    # A change here would change every split, sample and batch of everybody's old runs.
    assert permutation(8, 0, "rows") == [3, 2, 4, 1, 0, 6, 5, 7]
