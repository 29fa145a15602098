"""The arithmetic of loralib's layers: MergedLinear by its parts, convolutions as flat pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankwise.errors import ArtifactError, UserError
from rankwise.io.portable import Kernel
from rankwise.layers import Split
from rankwise.lowrank import Factors, scaling

__all__ = ["convolution", "merged", "merged_back"]


def merged(
    name: str, a: Tensor, b: Tensor, alpha: float, enabled: Sequence[bool], names: Sequence[str]
) -> tuple[dict[str, Factors], Split]:
    """The parts of a MergedLinear that are on, each with its own pair, and how it is split.

    Of n parts n_on are on. A (r · n_on, in) and B (out/n · n_on, r) are the weights of a
    convolution in n_on groups: part i has A[i·r : (i+1)·r] and B[i·out/n : (i+1)·out/n], s = α/r.
    ``name.x`` is the part x.

    Raises:
        ArtifactError: ``enabled`` does not go with the shapes.
        UserError: there are not as many names as parts.
    """
    on, r = sum(enabled), b.shape[1]
    if not on or a.shape[0] != r * on or b.shape[0] % on:
        said = "".join("1" if flag else "0" for flag in enabled)
        raise ArtifactError(
            f"'{name}': enable_lora {said} does not go with A {tuple(a.shape)} and B "
            f"{tuple(b.shape)}: A must be (r · parts that are on, in), B (their rows, r)."
        )
    if len(names) != len(enabled):
        raise UserError(
            f"'{name}' has {len(enabled)} parts and {len(names)} names ({', '.join(names)}) are "
            "given for them. Name each part in its order."
        )
    size, scale = b.shape[0] // on, scaling(r, alpha)
    places = [i for i, flag in enumerate(enabled) if flag]
    factors = {
        f"{name}.{names[place]}": Factors(
            a[i * r : (i + 1) * r].clone(), b[i * size : (i + 1) * size].clone(), scale
        )
        for i, place in enumerate(places)
    }
    return factors, Split(tuple(names), (size,) * len(enabled))


def merged_back(
    factors: Mapping[str, Factors], split: Split
) -> tuple[Tensor, Tensor, tuple[bool, ...]] | None:
    """A, B and enable_lora of a MergedLinear from its parts, the way back of :func:`merged`.

    ``factors`` are those of the parts that are on, in the order of the split. None where it cannot
    hold them: parts of unequal rows or ranks, or rows that are laid out head by head.
    """
    own = list(factors.values())
    size = own[0].out_features
    equal = split.sizes is None or set(split.sizes) == {size}
    if split.heads or not equal or any((f.out_features, f.r) != (size, own[0].r) for f in own):
        return None
    on = {name.rpartition(".")[2] for name in factors}
    enabled = tuple(name in on for name in split.names)
    return torch.cat([f.A for f in own]), torch.cat([f.B for f in own]), enabled


def convolution(
    name: str, a: Tensor, b: Tensor, alpha: float, weight: tuple[int, ...]
) -> tuple[Factors, Kernel]:
    """The flat pair of a loralib convolution, whose weight is (out, in/groups, *k).

    loralib has A (r·k, in·k), B (out/groups·k, r·k) and δ = s · (B A) laid over the weight in
    storage order. For two dimensions without groups row o·k + i of B A holds the i-th slice of the
    output o, so δ (out, k · in·k) = [B_0 ... B_{k−1}] diag(A, ..., A) with B_i = B[i::k], exactly,
    of rank r·k². Where that is no saving, or groups mix the storage, δ itself and the identity are
    the pair.

    Raises:
        ArtifactError: the numbers of B A are not those of the weight.
    """
    k, flat = weight[2], math.prod(weight[1:])
    if len(set(weight[2:])) != 1 or a.shape[0] % k or a.shape[1] % k:
        raise ArtifactError(
            f"'{name}': A {tuple(a.shape)} is no factor of a convolution {weight} of loralib, "
            "which has one kernel size k, A (r·k, in·k) and B (out/groups·k, r·k)."
        )
    if b.shape[0] * a.shape[1] != math.prod(weight):
        raise ArtifactError(
            f"'{name}': B A has {b.shape[0] * a.shape[1]:,} numbers and its weight {weight} has "
            f"{math.prod(weight):,}. loralib's Conv1d and Conv3d with a kernel above 1 have this "
            "fault and cannot run, so this update was never trained."
        )
    scale = scaling(a.shape[0] // k, alpha)
    kernel = Kernel(weight[1:], a.shape[1] // k // weight[1])
    if kernel.groups == 1 and a.shape[0] * k < min(weight[0], flat):
        wide = torch.block_diag(*[a] * k)
        return Factors(wide, b.reshape(weight[0], -1).contiguous(), scale), kernel
    delta = (b.double() @ a.double()).reshape(weight[0], flat).to(b.dtype)
    eye = torch.eye(min(weight[0], flat), dtype=b.dtype)
    return Factors(*((eye, delta) if flat <= weight[0] else (delta, eye)), scale), kernel
