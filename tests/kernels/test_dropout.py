"""Dropout of a branch by its seed: the mask's gradients, and nothing kept."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rankwise.kernels import BatchRows, Branch, PlainLinear, adapted_linear, dropout

P = 0.375  # a whole number of steps of 1 / 65536
CPU = torch.device("cpu")


@pytest.fixture(params=["by seed", "kept"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By its seed, and as on devices that are not known to draw from a generator of their own."""
    if request.param == "kept":
        monkeypatch.setattr(dropout, "_BY_SEED", set())
    return request.param


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def layer() -> PlainLinear:
    return PlainLinear(torch.randn(5, 7, dtype=torch.float64), None)


def branch(rows: BatchRows | None = None) -> Branch:
    return Branch(tensor(2, 7), tensor(5, 2), 1.7, P, rows=rows)


def test_gradients_are_those_of_the_mask_that_was_drawn(way: str):
    frozen, x, one = layer(), tensor(6, 7), branch()
    torch.manual_seed(3)
    y = adapted_linear(frozen, x, [one])
    torch.manual_seed(3)
    seed = dropout.new_seed(CPU)
    assert (seed is None) == (way == "kept")
    kept = x * dropout.draw((6, 7), CPU, P, seed) / (1 - P)
    plain = x @ frozen.weight.T + 1.7 * kept @ one.A.T @ one.B.T
    leaves = (x, one.A, one.B)
    found, wanted = (torch.autograd.grad(t.pow(2).sum(), leaves) for t in (y, plain))
    for a, b in zip((y, *found), (plain, *wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("numbers", [None, (1, 2), (0, 2)])
def test_gradients_are_those_of_finite_differences_twice(numbers: tuple[int, ...] | None, way: str):
    frozen, rows = layer(), None if numbers is None else BatchRows(numbers, 3)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return adapted_linear(frozen, x, [Branch(A, B, 1.7, P, rows=rows)])

    inputs = (tensor(3, 2, 7), tensor(2, 7), tensor(5, 2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_it_is_drawn_anew_each_time_and_follows_torchs_generator(way: str):
    frozen, x, one = layer(), tensor(6, 7), branch()
    torch.manual_seed(5)
    first = [adapted_linear(frozen, x, [one]) for _ in range(2)]
    torch.manual_seed(5)
    again = [adapted_linear(frozen, x, [one]) for _ in range(2)]
    assert not torch.equal(*first)
    assert all(map(torch.equal, first, again))


def test_of_the_mask_nothing_is_kept(way: str):
    frozen, x, one = layer(), tensor(6, 7), branch()
    there = {t.data_ptr() for t in (frozen.weight, one.A, one.B)}
    sizes: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        sizes[saved.data_ptr()] = saved.nbytes
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = adapted_linear(frozen, x, [one])
    assert y.requires_grad
    assert sum(n for at, n in sizes.items() if at not in there) == 8 * (6 * 7 + 2 * 6) + (
        6 * 7 if way == "kept" else 0
    )


@pytest.mark.parametrize("p", [0.0001, 0.05, 0.3, 0.5, 0.999])
def test_the_probability_is_that_of_dropout_and_the_gain_keeps_the_mean(p: float):
    mask = dropout.draw((3000, 201), CPU, p, 7)
    mean, spread = mask.double().mean().item(), (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mean - 1 / dropout.gain(p)) < 5 * spread
    assert abs(1 / dropout.gain(p) - (1 - p)) <= 2**-17
    rows = mask.double().mean(0)  # no place is favoured
    assert (rows - mean).abs().max() < 6 * (p * (1 - p) / 3000) ** 0.5 + 1e-12
    assert torch.equal(mask, dropout.draw((3000, 201), CPU, p, 7))
    assert p < 0.01 or not torch.equal(mask, dropout.draw((3000, 201), CPU, p, 8))


@pytest.fixture(params=["hashed", "drawn"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few thousand numbers, by the way of large masks and by that of small ones."""
    monkeypatch.setattr(dropout, "_FEW", 0 if request.param == "hashed" else 10**5)


@pytest.mark.usefixtures("small")
def test_neither_near_seeds_nor_near_places_have_anything_in_common():
    masks = torch.stack([dropout.draw((3000,), CPU, 0.5, seed) for seed in range(60)]).double()
    apart = masks - 0.5
    seeds = (apart @ apart.T / 750).fill_diagonal_(0)  # a correlation, ± 1/√3000
    assert seeds.abs().max() < 5.5 / 3000**0.5
    for lag in (1, 2, 3, 4, 8, 64, 201, 1024):
        alike = 4 * (apart[:, lag:] * apart[:, :-lag]).mean()
        assert abs(alike) < 5 / (60 * (3000 - lag)) ** 0.5, lag


@pytest.mark.parametrize("block", [2, 7, 64])
def test_a_mask_that_is_drawn_in_parts_has_no_part_twice(
    block: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dropout, "_BLOCK", block)
    monkeypatch.setattr(dropout, "_FEW", 0)
    mask = dropout.draw((3001,), CPU, 0.5, 7, torch.float64)
    assert abs(mask.mean() - 0.5) < 5 * 0.5 / 3001**0.5
    apart = 2 * mask - 1
    for lag in (1, block, 2 * block):
        assert abs((apart[lag:] * apart[:-lag]).mean()) < 5 / (3001 - lag) ** 0.5, lag


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64])
def test_a_mask_is_the_same_in_every_format(dtype: torch.dtype):
    mask = dropout.draw((11, 7), CPU, P, 5, dtype)
    assert mask.dtype is dtype
    assert torch.equal(mask.double(), dropout.draw((77,), CPU, P, 5, torch.float32).view(11, 7))


def test_gradients_may_be_taken_for_several_at_once():
    frozen, x, one = layer(), tensor(6, 7), branch()
    y = adapted_linear(frozen, x, [one]).sum(1)
    (found,) = torch.autograd.grad(y, x, torch.eye(6).double(), is_grads_batched=True,
                                   retain_graph=True)  # fmt: skip
    each = [torch.autograd.grad(y[i], x, retain_graph=True)[0] for i in range(6)]
    torch.testing.assert_close(found, torch.stack(each))


def test_there_are_masks_of_nothing():
    assert dropout.draw((0, 7), CPU, 0.5, 7, torch.float32).shape == (0, 7)
    assert dropout.dropped(torch.zeros(3, 0), 0.5).shape == (3, 0)


def test_any_number_of_threads_draws_the_same_mask():
    threads = torch.get_num_threads()
    masks: list[Tensor] = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            masks.append(dropout.draw((900, 300), CPU, 0.1, 7, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(masks[0], mask) for mask in masks)
    assert torch.equal(masks[0].bool(), dropout.draw((900, 300), CPU, 0.1, 7))


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_probabilities_at_the_ends_leave_finite_numbers(p: float):
    assert 1 <= dropout.gain(p) <= 2**16
    dropout.draw((3, 5), CPU, p, 7)


def test_a_rehearsal_without_data_keeps_no_mask_either():
    kept: list[Tensor] = []
    with FakeTensorMode():
        frozen, x, one = PlainLinear(torch.empty(5, 7), None), torch.empty(6, 7), torch.empty(2, 7)
        low = Branch(one.requires_grad_(), torch.empty(5, 2).requires_grad_(), 1.7, P)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = adapted_linear(frozen, x.requires_grad_(), [low])
        y.sum().backward()
    assert x.grad is not None
    assert kept
    assert all(t.dtype is not torch.bool for t in kept)


def test_a_rehearsal_costs_no_more_than_a_mask_of_torchs():
    calls: list[object] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Count():
        assert dropout.draw((2**14, 2**10), CPU, P, 5).shape == (2**14, 2**10)
    assert len(calls) <= 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_it_is_the_same_dropout(reentrant: bool):
    frozen, x, one = layer(), tensor(6, 7), branch()
    leaves = (x, one.A, one.B)
    found: list[tuple[Tensor, ...]] = []
    for again in (False, True):
        torch.manual_seed(5)
        if again:
            y = checkpoint(lambda x: adapted_linear(frozen, x, [one]), x, use_reentrant=reentrant)
        else:
            y = adapted_linear(frozen, x, [one])
        torch.rand(3)  # the generator goes on between forward and backward
        y.square().sum().backward()
        found.append(tuple(t.grad for t in leaves if t.grad is not None))
        for leaf in leaves:
            leaf.grad = None
    assert len(found[0]) == 3
    assert all(map(torch.equal, *found))
