"""using_rows: each row of a batch is what it is with its adapter alone, and so its gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rankwise as rw
from mixed import (
    IDS,
    MIXED,
    NAMES,
    SORTED,
    Methods,
    Pair,
    agree,
    alone,
    gradients,
    headed,
    lora,
    lora_pair,
    several,
)
from rankwise.kernels import can_pack
from rankwise.layers import pack
from zoo import Zoo

SPLIT = {"fused": rw.Split(("q", "k", "v"))}
HEADS = {"fused": rw.Split(("q", "k", "v"), heads=2)}
KINDS: dict[str, Methods] = {
    "LoRA": lora,
    "DoRA": lambda i: lora(i, dora=True),
    "rsLoRA, LoRA-FA": lambda i: lora(i, rank_stabilized=True, freeze_A=True),
    "a start": lambda i: lora(i, init=rw.OLoRA(), target_modules=["fused", "keys"]),
    "slots": lambda i: lora(i, slot=4),
    "biases": lambda i: lora(i, bias="adapted"),
    "blocks": lambda i: lora(i, target_modules=["fused.q", "fused.v"], split=SPLIT),
    "parts": lambda i: lora(i, target_modules=["fused.q", "fused.v"], split=HEADS),
    "parts, DoRA": lambda i: lora(i, target_modules=["fused.k"], split=HEADS, dora=True),
    "embedding": lambda i: lora(i, target_modules=["tokens"], tied=bool(i % 2)),
    "tokens": lambda i: lora(i, trainable_tokens={"tokens": [i + 1, 9, 7]}, tied=True),
    "bottleneck": lambda i: rw.Bottleneck(i + 2, rw.After(["fused", "turn"]), head="freeze"),
    "of all kinds": lambda i: (
        lora(0),
        lora(1, bias="adapted", dora=True),
        rw.Bottleneck(3, rw.After(["fused"]), head="freeze"),
    )[i],
}


@pytest.mark.parametrize("names", [MIXED, SORTED], ids=["mixed", "sorted"])
@pytest.mark.parametrize("method", KINDS.values(), ids=list(KINDS))
def test_each_row_is_what_it_is_alone(method: Methods, names: list[str | None]):
    model = several(method)
    expected = alone(model, names, IDS)
    with rw.using_rows(model, names):
        agree(model(IDS), expected)
        with torch.no_grad():
            agree(model(IDS), expected)
    assert (expected[0] - alone(model, [None], IDS)[0]).abs().max() > 1e-3


@settings(max_examples=20)
@given(st.lists(st.sampled_from([*NAMES, None]), min_size=1, max_size=7))
def test_whatever_the_order(names: list[str | None]):
    torch.manual_seed(1)
    model, x = several(lora_pair, Pair()), torch.randn(len(names), 6, dtype=torch.float64)
    with torch.no_grad(), rw.using_rows(model, names):
        agree(model(x), alone(model, names, x))


@pytest.mark.parametrize("shape", [(6, 6), (6, 4, 6), (18, 6), (12, 4, 6), (6, 2, 2, 6)])
def test_each_name_is_for_rows_that_lie_beside_each_other(shape: tuple[int, ...]):
    model, x = several(headed, Pair()), torch.randn(*shape, dtype=torch.float64)
    each = shape[0] // 6
    expected = alone(model, [name for name in MIXED for _ in range(each)], x)
    with rw.using_rows(model, MIXED):
        agree(model(x), expected)


def test_several_names_for_a_row_add_up():
    model, x = several(lambda i: lora_pair(i, dora=i == 1), Pair()), IDS.double() / 9
    x = torch.cat([x, x[:, :1]], -1)
    names = ["a", ("a", "b"), None, ("c", "a"), ("a", "b", "c"), ["b"]]
    with rw.using_rows(model, names):
        agree(model(x), alone(model, names, x))


@pytest.mark.skipif(not can_pack(torch.ones(2, 2)), reason="nothing is packed on this processor")
def test_frozen_layers_that_are_packed():
    model, x = several(lora_pair, Pair().float()), torch.randn(6, 9, 6)
    assert isinstance(model, Pair)
    with rw.using_rows(model, MIXED):
        expected = model(x)
        for layer in (model.keys, model.values):
            assert pack(layer.base_layer, 54) is not None
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(model(x[:, :1]), expected[:, :1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [lora_pair, lambda i: lora_pair(i, dora=True)])
def test_a_compiled_model_is_compiled_once_for_each_order_of_rows(method: Methods):
    model, x = several(method, Pair()), torch.randn(6, 6, dtype=torch.float64)
    times = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal times
        times += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for names in (MIXED, SORTED, MIXED):
        with rw.using_rows(model, names):
            agree(compiled(x), model(x))
    agree(compiled(x), model(x))
    assert times == 3


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [MIXED, SORTED], ids=["mixed", "sorted"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "biases", "tokens", "bottleneck", "blocks"])
def test_gradients_are_those_of_separate_runs(kind: str, names: list[str | None]):
    model = several(KINDS[kind])
    weights = torch.randn(6, 5, 24, dtype=torch.float64)
    for i, name in enumerate(names):
        if name is not None:
            with rw.using(model, name):
                (model(IDS[i : i + 1]) * weights[i]).sum().backward()
    expected = gradients(model)
    with rw.using_rows(model, names):
        y = model(IDS)
    (y * weights).sum().backward()  # outside of the block
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert {key.split()[0] for key in found} == set(NAMES)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-11)


def test_second_derivatives():
    model = several(headed, Pair())
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        with rw.using_rows(model, MIXED):
            return model(x)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_backward_inside_the_block(reentrant: bool):
    from torch.utils.checkpoint import checkpoint

    model = several(lora_pair, Pair())
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    with rw.using_rows(model, MIXED):
        model(x).square().sum().backward()
        expected, dx = gradients(model), x.grad
        x.grad = None
        y = checkpoint(model, x, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
    found = gradients(model)
    assert expected
    assert dx is not None
    assert x.grad is not None
    agree(x.grad, dx)
    for key, value in expected.items():
        agree(found[key], value)


def test_dropout_is_drawn_for_the_rows_that_it_is_for():
    model = several(lambda i: lora_pair(i, dropout=0.5), Pair()).train()
    x = torch.randn(6, 6, dtype=torch.float64)
    with rw.using_rows(model, MIXED):
        one, other = model(x), model(x)
        assert torch.equal(one[2], other[2])
        assert all(not torch.equal(one[i], other[i]) for i in (0, 1, 3, 4, 5))
        agree(one[2:3], alone(model, [None], x[2:3]))
        model.eval()
        agree(model(x), alone(model, MIXED, x))
        model.train()
        one.square().sum().backward()
    assert gradients(model)


@pytest.mark.parametrize("method", [lora, KINDS["biases"], KINDS["DoRA"], KINDS["embedding"]])
def test_bfloat16_stays_so(method: Methods):
    model = several(method, Zoo().bfloat16().requires_grad_(False).eval())
    with torch.no_grad(), rw.using_rows(model, MIXED):
        found = model(IDS)
        exact = alone(model, MIXED, IDS)
    assert found.dtype is torch.bfloat16
    assert (found - exact).float().norm() < 0.03 * exact.float().norm()  # some roundings of 2^-9


def test_under_autocast():
    model = several(headed, Pair().float())
    x = torch.randn(6, 6)
    with torch.autocast("cpu", torch.bfloat16), rw.using_rows(model, MIXED):
        found = model(x)
        expected = alone(model, MIXED, x)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
