"""loralib's own layers are the witness: their merged weight is the base's plus our δ."""

from __future__ import annotations

import loralib
import pytest
import torch

from rankwise.errors import ArtifactError, UserError
from rankwise.io.loralib_layers import convolution, merged, merged_back

NAMES = ("q", "k", "v")


def trained(layer: torch.nn.Module) -> torch.nn.Module:
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize(
    "enabled", [(True, False, True), (True, True, True), (False, True, False), (True, True, False)]
)
def test_a_merged_linear_is_its_parts(enabled: tuple[bool, ...]):
    layer = trained(loralib.MergedLinear(5, 12, r=2, lora_alpha=3, enable_lora=list(enabled)))
    factors, split = merged("c", layer.lora_A, layer.lora_B, 3, enabled, NAMES)
    assert list(factors) == [f"c.{n}" for n, on in zip(NAMES, enabled, strict=True) if on]
    assert (split.names, split.sizes) == (NAMES, (4, 4, 4))
    dense = torch.zeros(12, 5)
    for part, rows in split.rows(12).items():
        if f"c.{part}" in factors:
            dense[list(rows)] = factors[f"c.{part}"].delta().detach()
    torch.testing.assert_close(dense, (layer.merge_AB() * layer.scaling).detach())
    back = merged_back(factors, split)
    assert back is not None
    assert torch.equal(back[0], layer.lora_A)
    assert torch.equal(back[1], layer.lora_B)
    assert back[2] == enabled


@pytest.mark.parametrize("enabled", [(True, False, False), (False, False, False)])
def test_flags_that_do_not_go_with_the_shapes_are_refused(enabled: tuple[bool, ...]):
    layer = loralib.MergedLinear(5, 12, r=2, enable_lora=[True, False, True])
    with pytest.raises(ArtifactError, match=r"'c': enable_lora [01]{3} does not go with A"):
        merged("c", layer.lora_A, layer.lora_B, 1, enabled, NAMES)


def test_each_part_needs_a_name():
    layer = loralib.MergedLinear(5, 12, r=2, enable_lora=[True, False])
    with pytest.raises(UserError, match="'c' has 2 parts and 3 names"):
        merged("c", layer.lora_A, layer.lora_B, 1, (True, False), NAMES)


def test_loralib_itself_cannot_be_asked_for_no_parts():
    """A fault of loralib: all flags off leaves a layer that fails. Here it is a clear refusal."""
    layer = loralib.MergedLinear(5, 12, r=2, enable_lora=[False, False, False])
    with pytest.raises((AttributeError, RuntimeError)):
        layer(torch.zeros(1, 5))


@pytest.mark.parametrize(("r", "channels", "out", "k"), [(1, 3, 8, 3), (2, 4, 40, 3), (4, 3, 4, 3)])
def test_a_convolution_of_two_dimensions_is_a_flat_pair(r: int, channels: int, out: int, k: int):
    layer = trained(loralib.Conv2d(channels, out, k, r=r, lora_alpha=5))
    shape = tuple(layer.conv.weight.shape)
    f, kernel = convolution("c", layer.lora_A, layer.lora_B, 5, shape)
    assert (kernel.shape, kernel.groups) == ((channels, k, k), 1)
    assert f.r <= min(out, channels * k * k)
    before = layer.conv.weight.detach().clone()
    layer.eval()  # which merges
    torch.testing.assert_close(
        f.delta().detach().reshape(shape), layer.conv.weight.detach() - before, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("groups", [2, 6])
def test_a_convolution_in_groups_is_a_flat_pair(groups: int):
    layer = trained(loralib.Conv2d(6, 12, 3, groups=groups, r=1, lora_alpha=2))
    shape = tuple(layer.conv.weight.shape)
    f, kernel = convolution("c", layer.lora_A.detach(), layer.lora_B.detach(), 2, shape)
    assert kernel.groups == groups
    before = layer.conv.weight.detach().clone()
    layer.eval()
    torch.testing.assert_close(
        f.delta().reshape(shape), layer.conv.weight.detach() - before, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("kind", "dims"), [("Conv1d", 1), ("Conv3d", 3)])
def test_loralib_convolutions_that_cannot_run_are_refused(kind: str, dims: int):
    """A fault of loralib: but for two dimensions, B A has not as many numbers as the weight."""
    layer = getattr(loralib, kind)(3, 8, 3, r=2)
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.zeros(1, 3, *[5] * dims))
    with pytest.raises(ArtifactError, match="cannot run, so this update was never trained"):
        convolution("c", layer.lora_A, layer.lora_B, 1, tuple(layer.conv.weight.shape))


def test_a_kernel_of_one_is_a_linear_pair():
    layer = trained(loralib.Conv1d(16, 8, 1, r=2, lora_alpha=2))
    f, kernel = convolution("c", layer.lora_A, layer.lora_B, 2, (8, 16, 1))
    assert torch.equal(f.A, layer.lora_A)
    assert torch.equal(f.B, layer.lora_B)
    assert kernel.shape == (16, 1)


def test_a_pair_that_no_such_convolution_has_is_refused():
    with pytest.raises(ArtifactError, match="is no factor of a convolution"):
        convolution("c", torch.ones(4, 10), torch.ones(8, 4), 1, (8, 3, 3, 3))
