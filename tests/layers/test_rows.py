"""Groups of rows taken apart and joined again, a module's versions by rows, and what shows them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.layers.rows import ByRows, Groups, Routing, RowsDiffer


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.integers(1, 3))
def test_joining_is_the_inverse_of_taking_apart(keys: list[str], each: int):
    groups, t = Groups(keys), torch.randn(len(keys) * each, 2)
    parts = [rows.pick(t) for rows in groups.rows.values()]
    assert torch.equal(groups.join(parts), t)
    for key, part in zip(groups.rows, parts, strict=True):
        there = torch.tensor([k == key for k in keys]).repeat_interleave(each)
        assert torch.equal(part, t[there])


def test_the_rows_of_an_adapter_are_those_of_all_ways_with_it():
    routing = Routing([("a",), (), ("b", "a"), ("b",)])
    assert {way: rows.numbers for way, rows in routing.rows.items()} == {
        ("a",): (0,), (): (1,), ("b", "a"): (2,), ("b",): (3,)
    }  # fmt: skip
    assert {name: rows.numbers for name, rows in routing.by_adapter.items()} == {
        "a": (0, 2), "b": (2, 3)
    }  # fmt: skip
    assert routing.by_adapter["a"].run is None
    assert routing.by_adapter["b"].run == (2, 4)


@pytest.mark.parametrize(
    ("shape", "own", "fits"),
    [
        ((3, 5), 1, True), ((3, 7, 5), 1, True), ((12, 5), 1, True), ((9, 7, 5), 1, True),
        ((0, 5), 1, True), ((3, 3, 5), 1, True), ((3, 7), 0, True), ((6, 3, 8, 8), 3, True),
        ((4, 5), 1, False), ((1, 5), 1, False), ((3,), 1, False), ((6, 3, 5), 1, False),
        ((6, 3), 0, False), ((3, 8, 8), 3, False),
    ],
)  # fmt: skip
def test_which_inputs_have_three_rows(shape: tuple[int, ...], own: int, fits: bool):
    groups = Groups("aba")
    if fits:
        groups.fit(torch.Size(shape), own, "a layer")
        return
    with pytest.raises(UserError, match="a layer was given an input of shape"):
        groups.fit(torch.Size(shape), own, "a layer")


class Scaled(nn.Module):
    """A module with a mask by row and a number for all."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x: Tensor, mask: Tensor, plus: float = 0.0) -> Tensor:
        return self.by * x * mask + plus


def test_versions_of_a_module_get_their_rows_of_every_tensor():
    two, three = Scaled(2.0), Scaled(3.0)
    module = ByRows([three, two, three])
    x, mask = torch.randn(3, 4), torch.randn(3, 1)
    expected = torch.tensor([[3.0], [2.0], [3.0]]) * x * mask + 1
    torch.testing.assert_close(module(x, mask=mask, plus=1.0), expected)
    torch.testing.assert_close(module(mask=mask, x=x, plus=1.0), expected)
    assert {id(p) for p in module.parameters()} == {id(two.by), id(three.by)}


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_what_versions_of_a_module_cannot_be():
    with pytest.raises(UserError, match="Pairs give more than one tensor"):
        ByRows([Pairs(), Pairs()])(torch.ones(2, 3))
    with pytest.raises(UserError, match="Identity takes no tensor"):
        ByRows([nn.Identity(), nn.Identity()])("no tensor")
    with pytest.raises(UserError, match=r"one cache\. Call the model with use_cache=False"):
        ByRows([nn.Identity(), nn.Identity()])(torch.ones(2, 3), past_key_values=object())
    with pytest.raises(UserError, match="Identity was given an input of shape"):
        ByRows([nn.Identity(), nn.Identity()])(torch.ones(3, 3))


def test_a_weight_that_differs_by_row_has_a_shape_and_no_numbers():
    shown = RowsDiffer.of(nn.Parameter(torch.ones(2, 3)))
    assert (shown.shape, shown.ndim, shown.size(0), shown.numel()) == ((2, 3), 2, 2, 6)
    assert (shown.dtype, shown.device.type, shown.requires_grad) == (torch.float32, "cpu", False)
    assert isinstance(shown, Tensor)
    for use in (torch.ones(3).matmul, lambda t: t + 1, lambda t: t.T, lambda t: t.sum().item()):
        with pytest.raises(UserError, match="read by its owner"):
            use(shown)
