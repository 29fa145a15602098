"""The fused function against the plain formula: values, gradients, and what it refuses to be."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from rankwise.errors import RankwiseError
from rankwise.kernels import (
    BatchRows,
    Branch,
    PlainLinear,
    adapted_linear,
    add_delta_linear,
    can_fuse,
)
from rankwise.kernels.dropout import draw, new_seed

SCALE = 1.7


def tensor(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def frozen(out: int, width: int, dtype: torch.dtype = torch.float64) -> PlainLinear:
    return PlainLinear(torch.randn(out, width, dtype=dtype), torch.randn(out, dtype=dtype))


def formula(layer: PlainLinear, x: Tensor, branches: Sequence[Branch]) -> Tensor:
    y = F.linear(x, layer.weight, layer.bias)
    for b in branches:
        if b.block is None:
            y = add_delta_linear(y, x, b.A, b.B, b.scale, b.dropout)
        else:
            at = slice(*b.block)
            part = add_delta_linear(y[..., at], x, b.A, b.B, b.scale, b.dropout)
            y = torch.cat((y[..., : at.start], part, y[..., at.stop :]), -1)
    return y


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return torch.autograd.grad((y * weights).sum(), inputs)


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,)])
@pytest.mark.parametrize("blocks", [(None,), (None, None), ((0, 2), (3, 5)), ((1, 4), None)])
def test_values_and_gradients_are_those_of_the_formula(lead: tuple[int, ...], blocks: tuple):
    layer, x = frozen(5, 7), tensor(*lead, 7)
    branches = [
        Branch(tensor(r, 7), tensor(5 if at is None else at[1] - at[0], r), SCALE * r, 0.0, at)
        for r, at in enumerate(blocks, start=2)
    ]
    inputs = (x, *(t for b in branches for t in (b.A, b.B)))
    ours, plain = adapted_linear(layer, x, branches), formula(layer, x, branches)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(gradients(ours, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_those_of_finite_differences_twice():
    layer = frozen(5, 4)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return adapted_linear(layer, x, [Branch(A, B, SCALE)])

    inputs = (tensor(3, 2, 4), tensor(2, 4), tensor(5, 2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_with_dropout_are_those_of_finite_differences():
    layer = frozen(5, 4)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return adapted_linear(layer, x, [Branch(A, B, SCALE, 0.4)])

    inputs = (tensor(6, 4), tensor(2, 4), tensor(5, 2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivatives_with_frozen_factors_are_refused_and_not_wrong():
    layer, x = frozen(5, 4), tensor(6, 4)
    branch = Branch(tensor(2, 4, grad=False), tensor(5, 2), SCALE)
    y = adapted_linear(layer, x, [branch])
    with pytest.raises(RankwiseError, match="whose A is frozen"):
        torch.autograd.grad(y.sum(), branch.B, create_graph=True)


def test_dropout_keeps_the_mean_and_spares_the_frozen_layer():
    layer, x = frozen(3, 4), torch.ones(20_000, 4, dtype=torch.float64)
    branch = Branch(tensor(2, 4, grad=False), tensor(3, 2, grad=False), SCALE, 0.3)
    added = adapted_linear(layer, x, [branch]) - layer.forward(x)
    wanted = SCALE * x[0] @ branch.A.T @ branch.B.T
    spread = added.std(0) / 20_000**0.5
    assert ((added.mean(0) - wanted).abs() < 5 * spread).all()
    assert len(added.unique(dim=0)) == 2**4  # each input is kept or dropped by itself


def test_dropout_draws_the_same_with_and_without_gradients():
    """As reentrant checkpointing needs, which runs a layer once without and once with them."""
    layer, x = frozen(5, 7), tensor(2, 7, 3, grad=False).mT
    branch = Branch(tensor(2, 7), tensor(5, 2), SCALE, 0.5)
    found: list[Tensor] = []
    for context in (torch.enable_grad(), torch.no_grad()):
        torch.manual_seed(3)
        with context:
            found.append(adapted_linear(layer, x, [branch]))
    assert torch.equal(*found)


def test_backward_under_autocast_keeps_the_dtype_of_forward():
    layer, x = frozen(5, 7, torch.float32), tensor(6, 7, dtype=torch.float32)
    A, B = tensor(2, 7, dtype=torch.float32), tensor(5, 2, dtype=torch.float32)
    y = adapted_linear(layer, x, [Branch(A, B, SCALE)])
    wanted = torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), (x, A, B))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("trains", ["x", "A", "B", "AB"])
def test_only_what_needs_a_gradient_gets_one(trains: str):
    layer, x = frozen(5, 7), tensor(6, 7, grad="x" in trains)
    branch = Branch(tensor(2, 7, grad="A" in trains), tensor(5, 2, grad="B" in trains), SCALE)
    y = adapted_linear(layer, x, [branch])
    y.sum().backward()
    named = {"x": x, "A": branch.A, "B": branch.B}
    assert {n for n, t in named.items() if t.grad is not None} == set(trains)


@pytest.mark.parametrize(("trains", "held"), [("AB", 6 * 7 + 2 * 6), ("B", 2 * 6), ("A", 6 * 7)])
def test_what_is_kept_for_backward(trains: str, held: int):
    layer, x = frozen(5, 7), tensor(6, 7)
    branch = Branch(tensor(2, 7, grad="A" in trains), tensor(5, 2, grad="B" in trains), SCALE)
    there = {t.data_ptr() for t in (layer.weight, branch.A, branch.B)}
    sizes: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        sizes[saved.data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = adapted_linear(layer, x, [branch])
    assert y.requires_grad
    assert sum(n for at, n in sizes.items() if at not in there) == held


def test_nothing_is_kept_without_gradients():
    layer, x = frozen(5, 7), tensor(6, 7)
    with torch.no_grad():
        y = adapted_linear(layer, x, [Branch(tensor(2, 7), tensor(5, 2), SCALE)])
    assert y.grad_fn is None


def test_a_weight_that_is_written_before_backward_is_noticed():
    layer, x = frozen(5, 7), tensor(6, 7)
    y = adapted_linear(layer, x, [Branch(tensor(2, 7), tensor(5, 2), SCALE)])
    layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_at_step_zero_the_result_is_the_bases_bit_for_bit(dtype: torch.dtype):
    layer, x = frozen(64, 48, dtype), tensor(3, 11, 48, dtype=dtype)
    A, B = tensor(4, 48, dtype=torch.float32), torch.zeros(64, 4)
    y = adapted_linear(layer, x, [Branch(A, B, SCALE)])
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))


def test_factors_in_float32_train_beside_a_bfloat16_weight():
    layer, x = frozen(5, 7, torch.bfloat16), tensor(6, 7, dtype=torch.bfloat16)
    A, B = tensor(2, 7, dtype=torch.float32), tensor(5, 2, dtype=torch.float32)
    y = adapted_linear(layer, x, [Branch(A, B, SCALE)])
    dx, dA, dB = gradients(y, x, A, B)
    assert [t.dtype for t in (y, dx, dA, dB)] == [*[torch.bfloat16] * 2, *[torch.float32] * 2]
    wide = PlainLinear(layer.weight.double(), layer.weight.new_zeros(5).double())
    exact = gradients(
        formula(wide, x.double(), [Branch(A.double(), B.double(), SCALE)]), *(x, A, B)
    )
    for ours, wanted in zip((dx, dA, dB), exact, strict=True):
        assert (ours - wanted).norm() < 0.02 * wanted.norm()  # a few roundings of 2^-9


ROWS = {
    "runs": [(0, 1), (2,)],
    "others": [(0, 3), (1, 2)],
    "overlapping, and one in none": [(0, 2, 3), (0, 1, 2)],
}


def apart(
    layer: PlainLinear, x: Tensor, branches: Sequence[Branch], each: int, masks: Sequence[Tensor]
) -> Tensor:
    """The formula for every branch on all rows, with those set to zero that it is not for."""
    y = F.linear(x, layer.weight, layer.bias)
    for branch, mask in zip(branches, masks, strict=True):
        assert branch.rows is not None
        numbers = branch.rows.numbers
        ours = torch.tensor([i in numbers for i in range(4)]).repeat_interleave(each)
        shape = x.flatten(0, -2).shape
        kept = torch.zeros(shape, dtype=x.dtype)
        kept[ours] = mask.to(x.dtype) / (1 - branch.dropout)
        dropped = (x.flatten(0, -2) * kept).reshape(x.shape)
        alone = branch._replace(dropout=0.0, rows=None)
        y = y + formula(layer, dropped, [alone]) - F.linear(dropped, layer.weight, layer.bias)
    return y


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("lead", [(4,), (4, 3), (8,), (0, 3), (4, 9)])
@pytest.mark.parametrize("numbers", ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize("block", [None, (1, 4)])
def test_branches_for_some_rows(
    numbers: list[tuple[int, ...]],
    lead: tuple[int, ...],
    block: tuple[int, int] | None,
    dropout: float,
):
    layer, x = frozen(5, 7), tensor(*lead, 7)
    outputs = 5 if block is None else block[1] - block[0]
    branches = [
        Branch(tensor(r, 7), tensor(outputs, r), SCALE * r, dropout, block, BatchRows(n, 4))
        for r, n in enumerate(numbers, start=2)
    ]
    each = x.flatten(0, -2).shape[0] // 4
    torch.manual_seed(5)
    masks = [  # drawn as they are inside
        draw((len(n) * each, 7), x.device, dropout, new_seed(x.device))
        if dropout
        else torch.ones(len(n) * each, 7, dtype=torch.bool)
        for n in numbers
    ]
    inputs = (x, *(t for b in branches for t in (b.A, b.B)))
    torch.manual_seed(5)
    ours, plain = adapted_linear(layer, x, branches), apart(layer, x, branches, each, masks)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(gradients(ours, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(one, other)
    if not dropout:
        with torch.no_grad():  # where few rows go another way
            torch.testing.assert_close(adapted_linear(layer, x, branches), plain)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("numbers", [(1, 2), (0, 2)])
def test_gradients_for_some_rows_are_those_of_finite_differences_twice(
    numbers: tuple[int, ...], dropout: float
):
    layer, rows = frozen(5, 4), BatchRows(numbers, 3)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return adapted_linear(layer, x, [Branch(A, B, SCALE, dropout, rows=rows)])

    inputs = (tensor(3, 2, 4), tensor(2, 4), tensor(5, 2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("numbers", [(1, 2), (0, 2)])
def test_of_some_rows_x_and_their_product_are_kept(numbers: tuple[int, ...]):
    layer, x = frozen(5, 7), tensor(3, 4, 7)
    branches = [Branch(tensor(2, 7), tensor(5, 2), SCALE, rows=BatchRows(numbers, 3))] * 2
    there = {t.data_ptr() for b in branches for t in (layer.weight, b.A, b.B)}
    sizes: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        sizes[saved.data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        assert adapted_linear(layer, x, branches).requires_grad
    assert sum(n for at, n in sizes.items() if at not in there) == x.numel() + 2 * (2 * 2 * 4)


def _forward_mode(run: Callable[[], bool]) -> bool:
    with forward_ad.dual_level():
        return run()


def _autocast(run: Callable[[], bool]) -> bool:
    with torch.autocast("cpu", torch.bfloat16):
        return run()


def _vmap(run: Callable[[], bool]) -> bool:
    found: list[bool] = []
    torch.vmap(lambda x: (found.append(run()), x)[1])(torch.zeros(2))
    return found[0]


@pytest.mark.parametrize("inside", [_forward_mode, _autocast, _vmap])
def test_it_stands_back_where_others_take_over(inside: Callable[[Callable[[], bool]], bool]):
    x, weight = torch.zeros(2, 3), torch.zeros(3, 3)
    assert can_fuse(x, weight)
    assert not inside(lambda: can_fuse(x, weight))
    assert not can_fuse(x.bfloat16(), weight)


def test_a_compiled_layer_takes_the_formula_and_agrees():
    from rankwise.layers import Spec, wrap

    layer = wrap(nn.Linear(8, 6).requires_grad_(False), Spec(2, 4))
    nn.init.normal_(layer.update.lora_B)
    x = torch.randn(5, 8)
    seen: list[bool] = []

    def run(x: Tensor) -> Tensor:
        seen.append(can_fuse(x, layer.base_layer.weight))
        return layer(x)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert seen == [False]


def test_few_rows_of_blocks_and_ranks_of_their_own():
    layer, x = frozen(5, 7, torch.bfloat16), tensor(4, 7, dtype=torch.bfloat16, grad=False)
    branches = [
        Branch(tensor(2, 7), tensor(5, 2), SCALE, rows=BatchRows((0, 3), 4)),
        Branch(tensor(3, 7), tensor(2, 3), 0.7, 0.0, (1, 3), BatchRows((1,), 4)),
        Branch(tensor(1, 7), tensor(2, 1), 2.3, 0.0, (1, 3), BatchRows((1, 2), 4)),
    ]
    wide = PlainLinear(layer.weight.double(), layer.weight.new_zeros(5).double())
    assert layer.bias is not None
    wide.bias = layer.bias.double()
    masks = [torch.ones(len(b.rows.numbers), 7, dtype=torch.bool) for b in branches if b.rows]
    with torch.no_grad():
        found = adapted_linear(layer, x, branches)
        exact = apart(wide, x.double(), branches, 1, masks)
    assert found.dtype is torch.bfloat16
    assert (found - exact).norm() < 0.02 * exact.norm()  # a few roundings of 2^-9
