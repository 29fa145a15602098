"""Dropout of a model by seed: faster draws on a CPU, and no mask kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.kernels import dropped, is_eager

__all__ = ["BySeed", "drop_as_torch", "drop_by_seed"]


class BySeed:
    """Stands as the ``forward`` of an nn.Dropout: the same distribution, other draws.

    A number is dropped with probability p, to 2⁻¹⁶, by :func:`rankwise.kernels.dropped`. torch's
    own function is called in evaluation mode, on other devices than a CPU, for tensors that are not
    dense and real, and where no function with a backward of its own may be: in torch.func and while
    torch.compile traces.
    """

    def __init__(self, module: nn.Dropout) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, used by keyword
        """The input with some numbers zero and the others grown, in training."""
        p, active = self.module.p, self.module.training
        if active and 0.0 < p < 1.0 and input.device.type == "cpu" and is_eager():
            dense = input.layout is torch.strided and not input.is_nested
            if dense and input.is_floating_point():
                return dropped(input, p)
        return F.dropout(input, p, active)


def drop_by_seed(module: nn.Module) -> bool:
    """Let an nn.Dropout draw by seed; whether it does.

    Subclasses, those that write into their input, and those that somebody gave another forward are
    left alone.
    """
    if type(module) is not nn.Dropout or module.inplace or "forward" in vars(module):
        return False
    module.forward = BySeed(module)
    return True


def drop_as_torch(module: nn.Module) -> bool:
    """The inverse of :func:`drop_by_seed`; whether the module drew by seed."""
    if type(vars(module).get("forward")) is not BySeed:
        return False
    del module.forward
    return True
