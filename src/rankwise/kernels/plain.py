"""A frozen linear layer as it is stored: torch's own product, and its gradient without dW."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["PlainLinear"]


class PlainLinear:
    """y = x Wᵀ + b by the call that nn.Linear makes, so that it is the base's y bit for bit.

    Args:
        weight: W (out, in).
        bias: b (out,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b for x (..., in)."""
        return F.linear(x, self.weight, self.bias)

    def backward(self, dy: Tensor) -> Tensor:
        """dy W for dy (rows, out)."""
        return dy @ self.weight

    def saved(self) -> Tensor:
        """W itself."""
        return self.weight
