"""Batches: every row once, the same order for the same seed, little padding, right tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.batches import BatchPlan, collate
from rankwise.data.encode import Encoded
from rankwise.errors import UserError

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(LENGTHS, st.integers(1, 9), st.booleans(), st.booleans(), st.integers(1, 4))
def test_every_row_is_in_exactly_one_batch(lengths, size, shuffle, group, megabatch):
    plan = BatchPlan(lengths, size, 3, shuffle, group, megabatch)
    for epoch in (0, 1):
        batches = plan.epoch(epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert len(batches) == len(plan)
        sizes = sorted(map(len, batches), reverse=True)
        assert sizes[:-1] == [size] * (len(sizes) - 1)
        assert all(sizes)


@given(LENGTHS.filter(len), st.integers(0, 5), st.booleans())
def test_seed_and_epoch_are_the_whole_state(lengths, epoch, group):
    plan = BatchPlan(lengths, 4, seed=7, group=group)
    for earlier in range(epoch):
        plan.epoch(earlier)
    assert plan.epoch(epoch) == BatchPlan(list(lengths), 4, seed=7, group=group).epoch(epoch)


@pytest.mark.parametrize("group", [True, False])
def test_epochs_and_seeds_differ(group):
    lengths = [i % 13 + 1 for i in range(200)]
    orders = [BatchPlan(lengths, 8, s, group=group).epoch(e) for s in (0, 1) for e in (0, 1, 2)]
    assert len({str(order) for order in orders}) == 6


def padding(lengths, batches):
    return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)


def test_grouping_saves_most_of_the_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (2000,), generator=generator).tolist()
    grouped = padding(lengths, BatchPlan(lengths, 16).epoch(1))
    plain = padding(lengths, BatchPlan(lengths, 16, group=False).epoch(1))
    assert grouped < plain / 5


def test_grouping_still_mixes_lengths_over_the_epoch():
    lengths = list(range(1, 1001))
    longest = [max(lengths[i] for i in b) for b in BatchPlan(lengths, 10, megabatch=100).epoch(1)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_the_first_batch_of_all_is_the_longest():
    lengths = [5] * 300
    lengths[123] = 99
    for seed in range(5):
        assert 123 in BatchPlan(lengths, 4, seed).epoch(0)[0]


def test_evaluation_goes_longest_first_or_in_the_order_of_the_file():
    lengths = [2, 9, 4, 9, 1]
    assert BatchPlan(lengths, 2, shuffle=False).epoch(0) == [[1, 3], [2, 0], [4]]
    assert BatchPlan(lengths, 2, shuffle=False).epoch(5) == [[1, 3], [2, 0], [4]]
    assert BatchPlan(lengths, 2, shuffle=False, group=False).epoch(0) == [[0, 1], [2, 3], [4]]


def test_no_rows_make_no_batches():
    assert BatchPlan([], 4).epoch(0) == []
    assert len(BatchPlan([], 4)) == 0


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 1, "megabatch": 0}])
def test_sizes_below_one_are_refused(options):
    with pytest.raises(UserError, match="must be 1 or more"):
        BatchPlan([1], **options)


# --- collate -------------------------------------------------------------------------------------


def encoded(*ids: list[int], **rest: object) -> Encoded:
    return Encoded(list(ids), [len(i) for i in ids], list(range(len(ids))), **rest)


def assert_batch(batch, expected):
    assert list(batch) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], torch.tensor(values), rtol=0, atol=0)


def test_classes():
    rows = encoded([5, 6, 7], [8], [9], labels=[2, 0, 1], token_type_ids=[[0, 0, 1], [1], [0]])
    expected = {
        "input_ids": [[8, 3, 3], [5, 6, 7]],
        "attention_mask": [[1, 0, 0], [1, 1, 1]],
        "token_type_ids": [[1, 0, 0], [0, 0, 1]],
        "labels": [0, 2],
    }
    assert_batch(collate(rows, [1, 0], pad_id=3), expected)


def test_quantities_are_float32():
    batch = collate(encoded([5], [6], labels=[1.0, 2.5]), [1, 0], pad_id=0)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [2.5, 1.0]


def test_targets_are_padded_with_minus_100():
    rows = encoded([5, 6, 7], [8, 9], labels=[[-100, 6, 7], [-100, 9]])
    expected = {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 7], [-100, 9, -100]],
    }
    assert_batch(collate(rows, [0, 1], pad_id=0), expected)


def test_the_padding_goes_left_for_generation():
    rows = encoded([5, 6, 7], [8])
    expected = {
        "input_ids": [[5, 6, 7], [4, 4, 8]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
    }
    assert_batch(collate(rows, [0, 1], pad_id=4, side="left"), expected)


@given(st.integers(1, 20), st.integers(1, 9))
def test_the_length_is_the_longest_row_rounded_up(length, multiple):
    batch = collate(encoded([1] * length, [1]), [0, 1], 0, multiple)
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0
    assert length <= width < length + multiple


def test_an_ignored_padding_changes_no_loss():
    rows = encoded([5, 6, 7], [8, 9], labels=[[-100, 6, 7], [-100, 9]])
    labels = collate(rows, [0, 1], 0, multiple=8)["labels"]
    logits = torch.randn(2, 8, 11, dtype=torch.float64)
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    logs = logits.log_softmax(-1)
    by_hand = -(logs[0, 1, 6] + logs[0, 2, 7] + logs[1, 1, 9]) / 3
    torch.testing.assert_close(found, by_hand)


def test_no_rows_or_no_multiple_are_refused():
    with pytest.raises(UserError, match="got 0 rows"):
        collate(encoded([1]), [], 0)
    with pytest.raises(UserError, match="multiple 0"):
        collate(encoded([1]), [0], 0, multiple=0)
