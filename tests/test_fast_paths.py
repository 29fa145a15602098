"""Owners that read .weight and never call forward: their fast paths keep the adapter's effect."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import lora_layers
from rankwise.errors import UserError
from rankwise.layers import LoRALayer

ROWS, LENGTH, WIDTH = 3, 4, 8
TARGETS = ["linear1", "linear2", "out_proj"]
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False])


def encoder_layer(batch_first: bool = True, dropout: float = 0.0) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        WIDTH, 2, dim_feedforward=16, dropout=dropout, batch_first=batch_first
    )


def adapt(model: nn.Module, *targets: str) -> nn.Module:
    """Attach, and give every update a size that shows."""
    rw.attach(model, rw.LoRA(r=2, target_modules=targets, head="freeze"))
    for module in model.modules():
        if isinstance(module, LoRALayer):
            nn.init.normal_(module.update.lora_B, std=0.5)
    return model


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the calls into PyTorch's fused encoder and attention kernels."""
    calls: list[str] = []

    def spy(name: str):
        original = getattr(torch, name)

        def called(*arguments, **options):
            calls.append(name)
            return original(*arguments, **options)

        return mock.patch.object(torch, name, called)

    with spy("_transformer_encoder_layer_fwd"), spy("_native_multi_head_attention"):
        yield calls


@LAYOUTS
@pytest.mark.parametrize("target", TARGETS)
def test_the_effect_in_eval_is_the_effect_in_training(target: str, batch_first: bool):
    layer = encoder_layer(batch_first)
    x = torch.randn(ROWS, LENGTH, WIDTH)
    plain = layer.eval()(x).detach()
    adapt(layer, target)
    trained = layer.train()(x)
    with torch.no_grad(), counted() as calls:
        evaluated = layer.eval()(x)
    assert calls == (["_transformer_encoder_layer_fwd"] if batch_first else [])
    assert (trained - plain).abs().max() > 0.05
    torch.testing.assert_close(evaluated, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_a_padded_stack_of_encoder_layers_keeps_the_effect(nested: bool):
    stack = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=nested)
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    mask[1, 2:] = True
    x = torch.randn(ROWS, LENGTH, WIDTH)
    plain = stack.eval()(x, src_key_padding_mask=mask).detach()
    adapt(stack, *TARGETS)
    trained = stack.train()(x, src_key_padding_mask=mask)
    with torch.no_grad(), counted() as calls:
        evaluated = stack.eval()(x, src_key_padding_mask=mask)
    assert calls == ["_transformer_encoder_layer_fwd"] * 2
    keep = ~mask  # the nested path writes zeros where there is padding
    assert (trained - plain)[keep].abs().max() > 0.05
    torch.testing.assert_close(evaluated[keep], trained[keep], rtol=1e-5, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_keeps_the_effect_of_its_output_projection(
    training: bool, batch_first: bool
):
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first).train(training)
    x = torch.randn(ROWS, LENGTH, WIDTH)
    before = attention(x, x, x)[0].detach()
    projection = attention.out_proj
    adapt(attention, "out_proj")
    after = attention(x, x, x)[0]
    with torch.no_grad():
        inner = torch.linalg.lstsq(
            projection.weight.double(), (before - projection.bias).double().flatten(0, 1).T
        ).solution  # what enters the projection, found back from what left it
        delta = lora_layers(attention)["out_proj"].update.factors().delta().double()
    expected = before + (delta @ inner).T.reshape(before.shape).float()
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, x, x)[0], after, rtol=1e-5, atol=1e-5)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_every_factor_of_an_encoder_layer(training: bool):
    layer = adapt(encoder_layer().train(training), *TARGETS)
    found = gradients(layer, torch.randn(ROWS, LENGTH, WIDTH))
    expected = {
        f"{name}.updates.default.lora_{half}"
        for name in ("self_attn.out_proj", "linear1", "linear2")
        for half in "AB"
    }
    assert set(found) == expected
    assert all(grad.abs().max() > 0 for grad in found.values())


def test_dropout_beside_attention_that_never_runs_its_projection_is_refused():
    with pytest.raises(
        UserError, match=r"'self_attn\.out_proj' belongs to an nn.MultiheadAttention"
    ):
        rw.attach(
            encoder_layer(),
            rw.LoRA(r=2, target_modules=["out_proj"], dropout=0.1, head="freeze"),
        )


def test_attention_itself_is_refused_and_its_parts_are_named():
    with pytest.raises(
        UserError,
        match="MultiheadAttention is adapted by its single weights: name q_proj, k_proj, v_proj",
    ):
        rw.attach(encoder_layer(), rw.LoRA(target_modules=["self_attn"], head="freeze"))


def test_a_decoder_layer_keeps_the_effect():
    layer = nn.TransformerDecoderLayer(WIDTH, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    x, memory = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(ROWS, 5, WIDTH)
    plain = layer.eval()(x, memory).detach()
    adapt(layer, "multihead_attn.out_proj")
    with torch.no_grad():
        evaluated = layer(x, memory)
    assert (evaluated - plain).abs().max() > 0.05
    torch.testing.assert_close(evaluated, layer.train()(x, memory), rtol=1e-5, atol=1e-5)


def test_a_batch_without_padding_is_refused_with_the_way_out():
    layer = adapt(nn.Sequential(nn.Linear(WIDTH, 4)), "0")
    with pytest.raises(UserError, match=r"a nested tensor.*enable_nested_tensor=False"):
        layer(torch.nested.nested_tensor([torch.randn(n, WIDTH) for n in (2, 3)]))
