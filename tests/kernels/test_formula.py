"""The kernels against torch autograd: values, gradients, dtypes and bytes kept for backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.kernels import add_delta_embedding, add_delta_linear
from rankwise.layers import Spec, wrap

SCALE = 1.7


def tensor(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,), (2, 0, 3)])
def test_linear_is_the_formula_for_every_leading_shape(lead: tuple[int, ...]):
    base, x, A, B = tensor(*lead, 5), tensor(*lead, 7), tensor(2, 7), tensor(5, 2)
    y = add_delta_linear(base, x, A, B, SCALE, 0.0)
    torch.testing.assert_close(y, base + SCALE * torch.einsum("or,ri,...i->...o", B, A, x))


def test_linear_reads_an_input_that_is_not_contiguous():
    x, A, B = tensor(7, 6).T, tensor(2, 7), tensor(5, 2)
    base = tensor(5, 6).T
    y = add_delta_linear(base, x, A, B, SCALE, 0.0)
    torch.testing.assert_close(y, base + SCALE * x @ A.T @ B.T)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_embedding_is_the_formula(shape: tuple[int, ...]):
    ids = torch.randint(0, 9, shape)
    base, A, B = tensor(*shape, 5), tensor(2, 9), tensor(5, 2)
    y = add_delta_embedding(base, ids, A, B, SCALE, None)
    torch.testing.assert_close(y, base + SCALE * F.one_hot(ids, 9).double() @ A.T @ B.T)


# --- gradients -----------------------------------------------------------------------------------


def test_linear_gradients_are_those_of_finite_differences():
    def function(base: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return add_delta_linear(base, x, A, B, SCALE, 0.0)

    inputs = (tensor(3, 2, 5), tensor(3, 2, 4), tensor(2, 4), tensor(5, 2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def seeded_dropout(base: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return add_delta_linear(base, x, A, B, SCALE, 0.4)


def test_linear_gradients_with_dropout_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(
        seeded_dropout, (tensor(6, 5), tensor(6, 4), tensor(2, 4), tensor(5, 2))
    )


def test_dropout_falls_on_the_branch_alone_and_keeps_its_mean():
    base, x = tensor(6, 5), tensor(6, 4)
    A, B = tensor(2, 4), tensor(5, 2)
    torch.manual_seed(11)
    dropped = F.dropout(x, 0.4)
    assert (dropped == 0).any()
    torch.testing.assert_close(seeded_dropout(base, x, A, B), base + SCALE * dropped @ A.T @ B.T)


def test_embedding_gradients_are_those_of_finite_differences():
    ids = torch.tensor([[0, 3], [3, 6]])
    assert torch.autograd.gradcheck(
        lambda base, A, B: add_delta_embedding(base, ids, A, B, SCALE, None),
        (tensor(2, 2, 5), tensor(2, 7), tensor(5, 2)),
    )


def test_the_padding_row_of_an_embedding_gets_no_gradient():
    ids = torch.tensor([1, 2, 1, 4])
    A, B = tensor(2, 6), tensor(5, 2)
    add_delta_embedding(tensor(4, 5), ids, A, B, SCALE, 1).sum().backward()
    assert A.grad is not None
    assert [bool(column.any()) for column in A.grad.T] == [False, False, True, False, True, False]


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_and_the_gradient_of_x_have_the_bases_dtype(dtype: torch.dtype):
    base, x = tensor(3, 5, dtype=dtype), tensor(3, 4, dtype=dtype)
    A, B = tensor(2, 4, dtype=torch.float32), tensor(5, 2, dtype=torch.float32)
    y = add_delta_linear(base, x, A, B, SCALE, 0.0)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert A.grad is not None
    assert B.grad is not None
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (dtype, torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_one_factor_zero_the_result_is_base_bit_for_bit(dtype: torch.dtype):
    base, x = tensor(33, 5, dtype=dtype), tensor(33, 4, dtype=dtype)
    A, B = tensor(2, 4, dtype=torch.float32), tensor(5, 2, dtype=torch.float32)
    assert torch.equal(add_delta_linear(base, x, A, torch.zeros_like(B), SCALE, 0.0), base)
    ids = torch.randint(0, 4, (33,))
    assert torch.equal(add_delta_embedding(base, ids, torch.zeros_like(A), B, SCALE, None), base)


def test_autocast_lowers_a_linear_and_leaves_an_embedding():
    linear, embedding = nn.Linear(6, 5), nn.Embedding(9, 5)
    adapted = wrap(linear, Spec(2, 4)), wrap(embedding, Spec(2, 4))
    x, ids = torch.randn(3, 6), torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [(linear(x), adapted[0](x)), (embedding(ids), adapted[1](ids))]
    assert [plain.dtype for plain, _ in pairs] == [torch.bfloat16, torch.float32]
    for plain, ours in pairs:
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)


def test_autocast_does_not_lower_what_a_layer_keeps_in_float32():
    """As quantised layers do, which compute in a dtype of their own."""
    base, x, A, B = (tensor(*s, dtype=torch.float32) for s in ((3, 5), (3, 6), (2, 6), (5, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        y = add_delta_linear(base, x, A, B, SCALE, 0.0)
        start = add_delta_linear(base, x, A, torch.zeros_like(B), SCALE, 0.0)
    assert torch.equal(start, base)
    torch.testing.assert_close(y, base + SCALE * x @ A.T @ B.T, rtol=0.05, atol=0.05)


def test_autocast_gives_the_float32_gradients_to_the_rounding_of_bfloat16():
    layer = wrap(nn.Linear(32, 32), Spec(4, 8))
    nn.init.normal_(layer.update.lora_B, std=0.1)
    x = torch.randn(16, 32)

    def gradients() -> list[Tensor]:
        layer.zero_grad()
        layer(x).float().square().mean().backward()
        return [
            p.grad.clone() for p in (layer.update.lora_A, layer.update.lora_B) if p.grad is not None
        ]

    exact = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients()
    assert len(exact) == len(rounded) == 2
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert 0 < (a - b).norm() / a.norm() < 0.02  # bfloat16 rounds to 2^-9 = 0.2 %, a few times


# --- bytes kept for backward ---------------------------------------------------------------------

ROWS, WIDTH, RANK = 512, 64, 4


def kept(function: Callable[[], Tensor], *given: Tensor) -> dict[str, int]:
    """Bytes of the distinct storages kept for backward: those of given tensors, and others."""
    storages: dict[int, tuple[object, int]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = (saved, storage.nbytes())  # holding it keeps its address
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = function()
    assert y.requires_grad
    addresses = {t.untyped_storage().data_ptr() for t in given}
    parts = {"given": 0, "other": 0}
    for address, (_, size) in storages.items():
        parts["given" if address in addresses else "other"] += size
    return parts


def three(dtype: torch.dtype) -> nn.ModuleList:
    """Adapted q, k and v on a frozen base."""
    linears = [nn.Linear(WIDTH, WIDTH).to(dtype).requires_grad_(False) for _ in range(3)]
    return nn.ModuleList(wrap(linear, Spec(RANK, 2.0 * RANK)) for linear in linears)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_three_layers_on_one_input_keep_it_once_and_rows_of_rank_r(dtype: torch.dtype):
    layers = three(dtype)
    x = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    saved = kept(lambda: torch.stack([layer(x) for layer in layers]), x, *layers.parameters())
    assert saved["other"] == 3 * ROWS * RANK * x.element_size()
    assert saved["given"] >= x.nbytes


def test_the_input_is_kept_as_it_is_and_never_upcast():
    layer = three(torch.bfloat16)[0]
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert layer.update.lora_A.dtype == torch.float32
    held = {p.data_ptr() for p in layer.update.parameters()}  # float32, and there anyway
    assert {t.dtype for t in saved if t.data_ptr() not in held} == {torch.bfloat16}
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
