"""How an adapted layer is computed: the plain formula, and the fast paths held against it."""

from rankwise.kernels.dropout import dropped
from rankwise.kernels.eager import is_eager
from rankwise.kernels.formula import (
    add_delta_embedding,
    add_delta_linear,
    branch_embedding,
    branch_linear,
)
from rankwise.kernels.linear import Branch, Frozen, adapted_linear, can_fuse
from rankwise.kernels.packed import PackedLinear, can_pack
from rankwise.kernels.plain import PlainLinear
from rankwise.kernels.recompute import noted, recomputed
from rankwise.kernels.rows import BatchRows

__all__ = [
    "BatchRows",
    "Branch",
    "Frozen",
    "PackedLinear",
    "PlainLinear",
    "adapted_linear",
    "add_delta_embedding",
    "add_delta_linear",
    "branch_embedding",
    "branch_linear",
    "can_fuse",
    "can_pack",
    "dropped",
    "is_eager",
    "noted",
    "recomputed",
]
