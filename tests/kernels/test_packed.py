"""Packed frozen weights against the plain products: values, gradients, and when they stand back."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankwise.kernels import Branch, PackedLinear, adapted_linear, can_pack

if not can_pack(torch.zeros(1, 1)):  # pragma: no cover - a build of torch without oneDNN
    pytest.skip("this torch has no oneDNN to pack weights for", allow_module_level=True)

DTYPES = [d for d in (torch.float32, torch.bfloat16) if can_pack(torch.zeros(1, 1, dtype=d))]


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(24, 40).to(dtype).requires_grad_(False)


def runs_packed(packed: PackedLinear, x: Tensor) -> bool:
    """Whether oneDNN's operator for packed weights is called, told by the profiler."""
    with torch.profiler.profile() as profile, torch.no_grad():
        packed(x)
    return any("mkldnn::_linear_pointwise" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,)])
def test_values_and_gradients_are_those_of_the_plain_product(
    dtype: torch.dtype, lead: tuple[int, ...]
):
    module = layer(dtype)
    packed = PackedLinear(module, 6)
    found: list[tuple[Tensor, Tensor]] = []
    for call in (packed, module):
        x = torch.linspace(-1, 1, 24).expand(*lead, 24).to(dtype).requires_grad_()
        y = call(x)
        (dx,) = torch.autograd.grad(y.cos().sum(), x)
        found.append((y, dx))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
    assert runs_packed(packed, torch.zeros(2, 24, dtype=dtype))


def test_an_adapted_layer_trains_on_packed_kernels():
    module = layer()
    packed = PackedLinear(module, 6)
    A, B, x = (torch.randn(*s, requires_grad=True) for s in ((3, 24), (40, 3), (5, 24)))
    results = [
        torch.autograd.grad(
            adapted_linear(frozen, x, [Branch(A, B, 0.5)]).square().sum(), (x, A, B)
        )
        for frozen in (packed, packed.plain)
    ]
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def _written(module: nn.Linear) -> None:
    module.weight.mul_(2)


def _replaced(module: nn.Linear) -> None:
    module.weight = nn.Parameter(torch.randn(40, 24), requires_grad=False)


def _swapped(module: nn.Linear) -> None:
    module.weight.data = torch.randn(40, 24)


def _loaded(module: nn.Linear) -> None:
    module.load_state_dict(layer().state_dict())


def _in_training(module: nn.Linear) -> None:
    module.weight.requires_grad_()


def _bias_in_training(module: nn.Linear) -> None:
    module.bias.requires_grad_()


def _widened(module: nn.Linear) -> None:
    module.double()


CHANGES = [_written, _replaced, _swapped, _loaded, _in_training, _bias_in_training, _widened]


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_changes_is_computed_plainly(change: Callable[[nn.Linear], None]):
    module = layer()
    packed = PackedLinear(module, 6)
    assert runs_packed(packed, torch.zeros(3, 24))
    change(module)
    x = torch.randn(3, 24, dtype=module.weight.dtype)
    assert not runs_packed(packed, x)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, module.weight, module.bias))
    torch.testing.assert_close(packed.backward(packed.forward(x)), module(x) @ module.weight)


def test_a_weight_that_is_written_before_backward_is_noticed():
    module = layer()
    y = PackedLinear(module, 6)(torch.randn(3, 24, requires_grad=True))
    module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_transposed_weight():
    module = layer()
    turned = nn.Module()
    turned.weight = nn.Parameter(module.weight.T.clone(), requires_grad=False)
    turned.bias = module.bias
    x = torch.randn(3, 24, requires_grad=True)
    ours, plain = PackedLinear(turned, 6, turned=True)(x), module(x)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, plain)))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_module_packs_its_own_weight(again: Callable[[nn.Module], nn.Module]):
    module, x = layer(), torch.randn(3, 24)
    module.forward = PackedLinear(module, 6)
    wanted = module(x)
    twin = again(module)
    assert isinstance(twin.forward, PackedLinear)
    assert twin.forward.module is twin
    assert torch.equal(twin(x), wanted)
    twin.weight.zero_()
    assert torch.equal(module(x), wanted)
    assert torch.equal(twin(x), twin.bias.expand(3, 40))


def test_what_traces_a_packed_layer_follows_the_plain_product():
    module, x = nn.Sequential(layer()), torch.randn(3, 24)
    module[0].forward = PackedLinear(module[0], 6)
    wanted = module(x)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    exported = torch.export.export(module, (x,), strict=False).module()
    for traced in (compiled, exported):
        torch.testing.assert_close(traced(x), wanted)


def test_its_input_may_be_named_as_that_of_a_linear_layer():
    module, x = layer(), torch.randn(3, 24)
    module.forward = PackedLinear(module, 6)
    assert torch.equal(module(input=x), module(x))


def test_second_derivatives_are_those_of_the_plain_product():
    module = layer()
    packed = PackedLinear(module, 6)
    found: list[Tensor] = []
    for call in (packed, module):
        x = torch.linspace(-1, 1, 24, requires_grad=True)
        (dx,) = torch.autograd.grad(call(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_packed():
    assert not can_pack(torch.zeros(3, 3, dtype=torch.float64))
    assert not can_pack(torch.zeros(3, 3, device="meta"))
    assert not can_pack(torch.zeros(0, 3))
    assert not can_pack(torch.zeros(3))
    with torch.inference_mode():
        assert not can_pack(torch.zeros(3, 3))
