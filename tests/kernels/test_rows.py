"""Rows of a batch, picked out and added to: against numpy, wherever they lie."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.kernels import BatchRows


@given(st.data(), st.integers(1, 6), st.integers(0, 3))
def test_picking_and_adding_are_numpys(data: st.DataObject, of: int, each: int):
    numbers = sorted(data.draw(st.sets(st.integers(0, of - 1), min_size=1)))
    rows, t = BatchRows(numbers, of), torch.randn(of * each, 2)
    where = np.repeat(np.isin(np.arange(of), numbers), each)
    picked = rows.pick(t)
    np.testing.assert_array_equal(picked.numpy(), t.numpy()[where])
    expected = t.numpy().copy()
    expected[where] += 1.5
    rows.add_(t, torch.full_like(picked, 1.5))
    np.testing.assert_array_equal(t.numpy(), expected)


def test_a_run_is_read_as_a_view_and_others_as_a_copy():
    t = torch.randn(8, 3)
    assert BatchRows((1, 2), 4).pick(t).data_ptr() == t[2].data_ptr()
    assert BatchRows((1, 3), 4).pick(t).data_ptr() not in {row.data_ptr() for row in t}


def test_numbers_first_asked_for_without_autograd_serve_it_later():
    rows, t = BatchRows((0, 2), 3), torch.randn(3, 2, requires_grad=True)
    with torch.inference_mode():
        rows.pick(t)
    rows.pick(t).sum().backward()
    assert t.grad is not None
    assert t.grad.tolist() == [[1, 1], [0, 0], [1, 1]]
