"""recomputed and noted: bits of the function, what is kept, its runs, and what is noticed."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from counting import bytes_kept
from rankwise.kernels import Branch, PlainLinear, adapted_linear, noted, recomputed
from rankwise.kernels.recompute import origin_of


def tensor(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Counted:
    """A function that counts its runs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.runs = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.runs += 1
        return self.function(*inputs)


def layer(width: int, out: int, dtype: torch.dtype = torch.float64) -> tuple[PlainLinear, Branch]:
    A, B = torch.randn(2, width), torch.randn(out, 2)
    frozen = PlainLinear(torch.randn(out, width, dtype=dtype), None)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return frozen, Branch(A.to(wide).requires_grad_(), B.to(wide).requires_grad_(), 1.7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [recomputed, noted])
def test_values_and_gradients_are_the_functions_own_bit_for_bit(
    how: Callable[..., Tensor], dtype: torch.dtype
):
    gate, up = tensor(5, 7, dtype=dtype), tensor(5, 7, dtype=dtype)
    ours, plain = how(product, gate, up), product(gate, up)
    dy = torch.randn(5, 7).to(dtype)
    assert torch.equal(ours, plain)
    found, wanted = (torch.autograd.grad(y, (gate, up), dy) for y in (ours, plain))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("how", [recomputed, noted])
def test_an_adapted_layer_behind_gets_the_gradients_it_had(how: Callable[..., Tensor]):
    (frozen, branch), gate, up = layer(7, 5), tensor(6, 7), tensor(6, 7)
    leaves = (gate, up, branch.A, branch.B)
    both = [
        torch.autograd.grad(adapted_linear(frozen, x, [branch]).pow(3).sum(), leaves)
        for x in (how(product, gate, up), product(gate, up))
    ]
    assert all(map(torch.equal, *both))


def test_gradients_are_those_of_finite_differences_twice():
    frozen, branch = layer(4, 3)

    def function(gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
        x = recomputed(product, gate, up)
        return adapted_linear(frozen, x, [branch._replace(A=A, B=B)]) + x.sum(-1, keepdim=True)

    inputs = (tensor(2, 3, 4), tensor(2, 3, 4), branch.A, branch.B)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivatives_where_one_input_made_the_other():
    """Each input gets its own part alone, and not that of the other once more."""
    found: list[Tensor] = []
    for how in (recomputed, lambda f, *inputs: f(*inputs)):
        x = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
        gate = x.sin()
        y = how(product, gate, gate * x)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found += [dx, *torch.autograd.grad(dx.square().sum(), x)]
    torch.testing.assert_close(found[:2], found[2:])


def test_the_inputs_alone_are_kept():
    gate, up = tensor(6, 8), tensor(6, 8)
    frozen, branch = layer(8, 5)
    there = (frozen.weight, branch.A, branch.B)
    both, low = 2 * gate.nbytes, 2 * 6 * 8  # g and u, and P
    assert bytes_kept(lambda: recomputed(product, gate, up)) == both

    def run() -> Tensor:
        return adapted_linear(frozen, recomputed(product, gate, up), [branch])

    assert bytes_kept(run, *there) == both + low
    assert (
        bytes_kept(lambda: adapted_linear(frozen, product(gate, up), [branch]), *there)
        == 2 * both + low
    )


def test_all_that_read_the_result_run_the_function_once_more():
    function, x = Counted(norm), tensor(6, 8)
    layers = [layer(8, 5) for _ in range(3)]

    def run(how: Callable[..., Tensor]) -> Tensor:
        y = how(function, x)
        return torch.stack([adapted_linear(f, y, [b]) for f, b in layers]).square().sum()

    for how in (recomputed, noted):
        function.runs = 0
        loss = run(how)
        assert function.runs == 1
        loss.backward(retain_graph=True)
        assert function.runs == 2
        loss.backward()
        assert function.runs == 3


def test_nothing_is_held_after_backward():
    made: list[weakref.ref[Tensor]] = []

    def function(x: Tensor) -> Tensor:
        y = norm(x)
        made.append(weakref.ref(y))
        return y

    x, (frozen, branch) = tensor(6, 8), layer(8, 5)
    for how in (recomputed, noted):
        y = adapted_linear(frozen, how(function, x), [branch])
        gc.disable()  # no cycle may hold it either
        try:
            y.sum().backward(retain_graph=True)
            assert len(made) > 1
            assert [r() for r in made[1:]] == [None] * (len(made) - 1)
        finally:
            gc.enable()
        made.clear()


def test_a_part_of_the_gradients_alone():
    """Where the function's own backward does not run, and then does."""
    x, layers = tensor(6, 8), [layer(8, 5) for _ in range(2)]
    y = recomputed(norm, x)
    loss = sum(adapted_linear(f, y, [b]).square().sum() for f, b in layers)
    assert isinstance(loss, Tensor)
    leaves = (x, *(t for _, b in layers for t in (b.A, b.B)))
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    for i in (1, 3, 1, 0, 0):
        (one,) = torch.autograd.grad(loss, leaves[i], retain_graph=True)
        assert torch.equal(one, wanted[i])


def test_what_was_written_since_is_not_made_again():
    x = tensor(3, 4)
    y = noted(torch.sin, x)
    assert origin_of(y) is not None
    y.mul_(2)
    assert origin_of(y) is None
    y = noted(torch.sin, x)
    with torch.no_grad():
        x.mul_(2)
    assert origin_of(y) is None
    assert origin_of(tensor(3)) is None


def test_a_result_that_is_written_gives_its_layer_the_right_gradient():
    x, (frozen, branch) = tensor(6, 8), layer(8, 5)
    found: list[Tensor] = []
    for how in (recomputed, lambda f, x: f(x)):
        y = how(norm, x)
        y.mul_(2)
        found.append(torch.autograd.grad(adapted_linear(frozen, y, [branch]).sum(), branch.A)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_or_parameter_that_is_written_before_backward_is_noticed(which: int):
    x, weight = tensor(3, 4), torch.randn(4, dtype=torch.float64)
    y = recomputed(lambda x, weight: norm(x) * weight, x, weight)
    with torch.no_grad():
        (x, weight)[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_without_gradients_it_is_the_function_alone():
    function, x = Counted(norm), tensor(3, 4)
    with torch.no_grad():
        y = recomputed(function, x)
    assert function.runs == 1
    assert origin_of(y) is None
    assert origin_of(noted(function, x.detach())) is None


def test_transforms_and_the_compiler_see_the_function():
    x = tensor(3, 4).detach()

    def ours(t: Tensor) -> Tensor:
        return recomputed(torch.sin, t).sum()

    torch.testing.assert_close(torch.func.grad(ours)(x), x.cos())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(ours))(x), x.cos())
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = x.requires_grad_()
    torch.testing.assert_close(*torch.autograd.grad(compiled(x), x), x.cos())


def test_the_second_run_has_the_autocast_of_the_first():
    x, weight = tensor(6, 8, dtype=torch.float32), torch.randn(8, 8)
    seen: list[torch.dtype] = []

    def function(x: Tensor) -> Tensor:
        y = F.linear(x, weight)
        seen.append(y.dtype)
        return y

    with torch.autocast("cpu", torch.bfloat16):
        y = recomputed(function, x)
    y.float().sum().backward()
    y = recomputed(function, x)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant: bool):
    x, (frozen, branch) = tensor(6, 8), layer(8, 8)

    def block(x: Tensor) -> Tensor:
        return adapted_linear(frozen, recomputed(product, recomputed(norm, x), x), [branch])

    leaves = (x, branch.A, branch.B)
    wanted = torch.autograd.grad(block(block(x)).square().sum(), leaves)
    inner = checkpoint(block, x, use_reentrant=reentrant)
    y = checkpoint(block, inner, use_reentrant=reentrant)
    y.square().sum().backward()
    for leaf, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_with_what_is_kept_moved_elsewhere():
    x, (frozen, branch) = tensor(6, 8), layer(8, 5)
    found: list[Tensor] = []
    for how in (recomputed, lambda f, x: f(x)):
        with torch.autograd.graph.save_on_cpu():
            y = adapted_linear(frozen, how(norm, x), [branch])
        found.append(torch.autograd.grad(y.sum(), branch.A)[0])
    assert torch.equal(*found)


def test_a_result_is_saved_as_any_tensor(tmp_path: Path):
    y = recomputed(norm, tensor(3, 4))
    torch.save(y, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), y)
