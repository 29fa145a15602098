"""Thin products in pieces: the products that numpy computes, from as many kernel calls."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise as rw
from rankwise.kernels.thin import _divisor, add_spread, gathered, narrow, spread

N, WIDE, R = 512, 24, 3


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def flat(thin: Tensor) -> np.ndarray:
    """The (r, N) that a thin tensor stands for."""
    return thin.numpy() if thin.ndim == 2 else np.concatenate(list(thin.numpy()), axis=1)


@pytest.mark.parametrize("sliced", [False, True], ids=["whole rows", "a block of columns"])
def test_each_product_is_that_of_the_whole_matrices(threads: int, sliced: bool) -> None:
    rows = numbers(N, 2 * WIDE)[:, 5 : 5 + WIDE] if sliced else numbers(N, WIDE)
    M = numbers(R, WIDE)
    thin = narrow(M, rows)
    assert thin.ndim == (2 if threads == 1 else 3)
    np.testing.assert_allclose(flat(thin), M.numpy() @ rows.numpy().T, atol=1e-12)
    np.testing.assert_allclose(gathered(thin, rows).numpy(), flat(thin) @ rows.numpy(), rtol=1e-10)
    np.testing.assert_allclose(spread(thin, M).numpy(), flat(thin).T @ M.numpy(), rtol=1e-10)
    wanted = rows.numpy() - 0.5 * flat(thin).T @ M.numpy()
    add_spread(rows, thin, M, -0.5)
    np.testing.assert_allclose(rows.numpy(), wanted, atol=1e-11)


def test_pieces_are_equal_of_many_rows_and_no_more_than_threads() -> None:
    found = {(n, t): _divisor(n, t) for n in range(2200) for t in (1, 2, 3, 4, 16)}
    for (n, most), parts in found.items():
        assert n % parts == 0
        assert 1 <= parts <= most
        assert parts == 1 or n // parts >= 128
    assert [found[n, 2] for n in (255, 256, 1088, 1089)] == [1, 2, 2, 1]
    assert [found[n, 16] for n in (1024, 2048, 2187)] == [8, 16, 9]


def test_formats_without_kernels_of_their_own_and_other_devices_stay_whole(threads: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        rows, M = numbers(N, WIDE, dtype=torch.float32).to(dtype), numbers(R, WIDE).to(dtype)
        assert narrow(M, rows).ndim == 2
    assert (
        narrow(torch.empty(R, WIDE, device="meta"), torch.empty(N, WIDE, device="meta")).ndim == 2
    )


class Products(TorchDispatchMode):
    """Counts the products that torch's kernels compute."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm_"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_layer_calls_as_many_products_in_pieces_as_whole(threads: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE))
    rw.attach(model, rw.LoRA(R, target_modules=["0"]))
    x = numbers(4, N // 4, WIDE, dtype=torch.float32).requires_grad_()
    with Products() as products:
        model(x).sum().backward()
    whole = ["addmm", "mm", "addmm_", "mm", "mm", "addmm_", "mm", "mm"]
    pieces = ["addmm", "bmm", "baddbmm_", "mm", "bmm", "baddbmm_", "bmm", "bmm"]
    assert products.found == (whole if threads == 1 else pieces)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_first_and_second_order_in_pieces(threads: int, dropout: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()).double()
    rw.attach(model, rw.LoRA(2, target_modules=["0"], dropout=dropout))
    torch.nn.init.normal_(model[0].update.lora_B)
    x = numbers(256, 4).requires_grad_()
    v, w = numbers(256, 3), numbers(4, 2).T

    def first(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)  # the same dropout each time
        y = torch.func.functional_call(
            model, {"0.updates.default.lora_A": A, "0.updates.default.lora_B": B}, (x,)
        )
        return torch.autograd.grad((y * v).sum(), (A, B), create_graph=True)

    A, B = (p.detach().clone().requires_grad_() for p in model[0].update.trained())
    assert torch.autograd.gradcheck(lambda A, B: first(A, B)[0].mul(w).sum(), (A, B), atol=1e-4)
    assert torch.autograd.gradcheck(
        lambda x: (torch.manual_seed(3), model(x))[1].mul(v).sum(), (x,), atol=1e-5, fast_mode=True
    )
