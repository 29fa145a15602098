"""Device and number format: chosen or named, the frozen base cast once, what trains in float32."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.attaching import attachment, trained_copies
from rankwise.errors import EnvironmentFault
from rankwise.layers import Update
from rankwise.targets import find_head

__all__ = ["Choice", "cast_frozen", "choose_device", "choose_dtype"]


@dataclass(frozen=True)
class Choice:
    """A number format and the reason for it."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose_device(name: str) -> torch.device:
    """The device of this name, or for "auto" the first of cuda, mps and cpu that is there.

    Raises:
        EnvironmentFault: the named device is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, there in present.items() if there))
    if not present[name]:
        there = ", ".join(device for device, is_there in present.items() if is_there)
        raise EnvironmentFault(
            f"--device {name} was asked for, but this machine (with this build of torch "
            f"{torch.__version__}) has none. There is: {there}."
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, width: int, frozen: bool) -> Choice:
    """The number format of the base.

    For "auto": float32 when the base itself trains; bfloat16 on a GPU that has it; on a CPU
    whichever of the two multiplies faster at the model's own width, measured now for about a
    second, because bfloat16 is several times faster on CPUs with bfloat16 instructions and far
    slower on others.

    Args:
        width: the model's hidden size, for the measurement.
        frozen: whether the base stays frozen.
    """
    if name != "auto":
        return Choice(getattr(torch, name), "as asked")
    if not frozen:
        return Choice(torch.float32, "the base itself trains")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return Choice(torch.bfloat16, "this GPU computes in bfloat16")
        return Choice(torch.float32, "this GPU has no bfloat16")
    if device.type == "mps":
        return Choice(torch.float32, "the safe choice on mps")
    single, half = _seconds(torch.float32, width), _seconds(torch.bfloat16, width)
    reason = f"measured here: bfloat16 takes {half / single:.2g} times as long as float32"
    return Choice(torch.bfloat16 if half < 0.9 * single else torch.float32, reason)


def _seconds(dtype: torch.dtype, width: int) -> float:
    """The best of a few products of 128 rows with a width by 4·width matrix and back.

    Wider than 768 tells nothing more, and takes minutes where bfloat16 is emulated.
    """
    width = min(width, 768)
    x = torch.ones(128, width, dtype=dtype)
    w = torch.ones(4 * width, width, dtype=dtype)
    best, spent = float("inf"), 0.0
    for _ in range(8):
        start = time.perf_counter()
        _ = torch.nn.functional.linear(x, w) @ w
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
        if spent > 0.2:
            break
    return best


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen floating-point parameters to ``dtype`` once; what trains stays as it is.

    Buffers keep their format (rotary frequencies need float32). A trained copy of a module takes
    its inputs in its own format from then on and gives its outputs in ``dtype``; a head keeps its
    outputs, the logits, in its own. The originals that the copies stand for are cast as well, so
    that detaching gives a model of one format.
    """
    updates = {id(p) for m in model.modules() if isinstance(m, Update) for p in m.parameters()}
    for parameter in model.parameters():
        frozen = not parameter.requires_grad and id(parameter) not in updates
        if frozen and parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)
    for original in attachment(model).originals.values():
        original.to(dtype)
    head = find_head(model)
    for name, module in trained_copies(model).items():
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        if not head.holds(name):
            module.register_forward_hook(lambda _module, _args, made: _cast(made, dtype))


def _cast_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = next(p.dtype for p in module.parameters())
    return tuple(_cast(a, dtype) for a in args), {k: _cast(v, dtype) for k, v in kwargs.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor, or those of a tuple, in this format; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def allocation_failed(error: BaseException) -> bool:
    """Whether an exception means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
