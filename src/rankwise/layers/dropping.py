"""Dropout of a model by seed: faster draws on a CPU, and no mask kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.kernels import dropped, is_eager

__all__ = ["BySeed", "all_by_seed", "drop_as_torch", "drop_by_seed"]

_FEW = 1 << 15  # numbers, for which torch's own function is faster


class BySeed:
    """Stands as the ``forward`` of an nn.Dropout: the same distribution, other draws.

    A number is dropped with probability p, to 2⁻¹⁶, by :func:`rankwise.kernels.dropped`. torch's
    own function is called in evaluation mode, on other devices than a CPU, for few numbers, for
    tensors that are not dense and real or are of a class of their own, and where no function with a
    backward of its own may be: in torch.func and while torch.compile traces. A shallow copy of the
    module obeys the original's mode, and torch.jit.script wants the module's own forward back.
    """

    def __init__(self, module: nn.Dropout) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, used by keyword
        """The input with some numbers zero and the others grown, in training."""
        p, active = self.module.p, self.module.training
        many = active and 0.0 < p < 1.0 and input.numel() > _FEW
        if many and input.device.type == "cpu" and is_eager() and _is_plain(input):
            return dropped(input, p)
        return F.dropout(input, p, active)


def _is_plain(input: Tensor) -> bool:  # noqa: A002 - as above
    dense = input.layout is torch.strided and not input.is_nested
    alike = type(input) is type(torch.empty(0))  # both are without numbers in a rehearsal
    return dense and alike and input.is_floating_point()


def all_by_seed(model: nn.Module) -> tuple[str, ...]:
    """Let all dropout of a model draw by seed, where it drops anything; the modules' names."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Dropout))
    return tuple(name for name, module in found if module.p > 0 and drop_by_seed(module))


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
