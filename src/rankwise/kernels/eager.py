"""Whether torch runs operators one by one, so that a function of ours may stand for several."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_transforms = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage]
_any_autocast = torch._C._is_any_autocast_enabled  # pyright: ignore[reportPrivateUsage]
_tracing = torch._C._is_tracing  # pyright: ignore[reportPrivateUsage]

__all__ = ["is_eager", "is_lowered"]


def is_eager() -> bool:
    """Whether a function with a backward of its own may be called.

    It may not inside torch.func's transforms and forward-mode derivatives, which ask for more than
    a backward, and while torch.compile or torch.export trace, which fuse the plain operators
    themselves.
    """
    return (
        not torch.compiler.is_compiling()
        and not _transforms()
        and forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
        and not _tracing()
    )


def is_lowered(kind: str) -> bool:
    """Whether autocast is on for this kind of device."""
    return (
        _any_autocast()
        and torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
    )
