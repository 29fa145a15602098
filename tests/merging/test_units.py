"""The unit roundoff and γ: what they are in each dtype, and that they bound what they should."""

import pytest
import torch

from rankwise.merging.units import gamma, roundoff, smallest


@pytest.mark.parametrize(
    ("dtype", "u"),
    [
        (torch.float64, 2**-53),
        (torch.float32, 2**-24),
        (torch.float16, 2**-11),
        (torch.bfloat16, 2**-8),
    ],
)
def test_the_unit_roundoff_is_half_a_step_at_one(dtype, u):
    assert roundoff(dtype) == u
    above = torch.tensor([1 + 1.01 * u, 1 + 0.99 * u], dtype=torch.float64).to(dtype).double() - 1
    assert above.tolist() == [2 * u, 0]


def test_gamma_bounds_a_sum_of_products():
    torch.manual_seed(0)
    a, b = torch.randn(2, 500)
    total = torch.zeros(())
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    exact = a.double() @ b.double()
    bound = gamma(500, roundoff(torch.float32)) * (a.double().abs() @ b.double().abs())
    assert 0 < abs(total - exact) <= bound
    assert gamma(2**30, roundoff(torch.float32)) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_below_the_smallest_number_may_be_lost(dtype):
    assert torch.tensor(smallest(dtype), dtype=torch.float64).to(dtype) == smallest(dtype)
    assert torch.tensor(smallest(dtype) * 2**-12, dtype=torch.float64).to(dtype) < smallest(dtype)
