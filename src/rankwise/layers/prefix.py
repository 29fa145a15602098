"""Trained keys and values in front of those of an attention, free or grown by a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankwise.errors import RankwiseError
from rankwise.layers.spec import Switch
from rankwise.layers.update import Update

if TYPE_CHECKING:
    from rankwise.layers.layer import LoRALayer

__all__ = ["FreePrefix", "GrownPrefix", "Prefix", "Trunk"]


class Prefix(Update, ABC):
    """L trained keys and values that every query of an attention sees before those of the tokens.

    They are P_k and P_v (heads, L, d), with the heads of the keys: fewer than those of the queries
    where queries share them. With λ the share of a query's softmax that falls
    on the prefix, its output is (1 − λ) · attention(K, V) + λ · attention(P_k, P_v): another one
    than the base's from the first step.

    Source: Li and Liang 2021, arXiv 2101.00190, section 4; docs/math.md (21).
    """

    barrier = "is a prefix of keys and values, which no weight of the attention can hold"

    @abstractmethod
    def pair(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v (heads, L, d), differentiable."""

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, n, d) with the prefix in front: (batch, heads, L + n, d).

        Raises:
            RankwiseError: the attention's heads are others than those the prefix was made for.
        """
        own_keys, own_values = self.pair()
        for own, those in ((own_keys, key), (own_values, value)):
            if (own.shape[0], own.shape[2]) != (those.shape[1], those.shape[3]):
                raise RankwiseError(
                    f"A prefix was made for {own.shape[0]} heads of size {own.shape[2]}, and its "
                    f"attention has {those.shape[1]} of size {those.shape[3]}. Please report this "
                    "with the architecture's name."
                )
        return _joined(own_keys, key), _joined(own_values, value)

    def add(self, y: Tensor, x: Tensor, plain: Tensor, layer: LoRALayer) -> Tensor:
        raise RankwiseError("A prefix acts inside an attention, not on a layer's outputs.")


def _joined(own: Tensor, those: Tensor) -> Tensor:
    own = own.to(those.dtype).expand(those.shape[0], -1, -1, -1)
    return torch.cat([own, those], dim=2)


class FreePrefix(Prefix):
    """A prefix whose keys and values are parameters themselves: ``keys`` and ``values``."""

    def __init__(self, keys: Tensor, values: Tensor, switch: Switch) -> None:
        super().__init__()
        self.switch = switch
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def extra_repr(self) -> str:
        return f"heads={self.keys.shape[0]}, length={self.keys.shape[1]}"


class Trunk(nn.Module):
    """tanh(E W₁ᵀ + b₁) (L, hidden): what the prefixes of all layers grow from."""

    def __init__(self, length: int, width: int, hidden: int, like: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(like.new_empty(length, width).normal_())
        self.inner = nn.Linear(width, hidden, device=like.device, dtype=like.dtype)

    def forward(self) -> Tensor:
        return torch.tanh(self.inner(self.embedding))


class GrownPrefix(Prefix):
    """[P_k, P_v] = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂, with E, W₁ and b₁ shared by the prefixes of a model.

    The first of them holds the shared part as ``trunk``; the others refer to it.

    Source: Li and Liang 2021, arXiv 2101.00190, section 4.3.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        trunk: Trunk,
        switch: Switch,
        *,
        first: bool,
    ) -> None:
        super().__init__()
        self.switch = switch
        self.heads, self.size = shape
        like, hidden = trunk.embedding, trunk.inner.out_features
        outputs = 2 * self.heads * self.size
        self.outer = nn.Linear(hidden, outputs, device=like.device, dtype=like.dtype)
        if first:
            self.trunk = trunk
        else:
            object.__setattr__(self, "trunk", trunk)  # a submodule of the first one already

    def pair(self) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.outer.weight.device.type, enabled=False):
            grown = self.outer(self.trunk())  # (L, 2 · heads · d)
        keys, values = grown.view(-1, 2, self.heads, self.size).permute(1, 2, 0, 3)
        return keys, values
