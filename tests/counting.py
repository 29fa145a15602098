"""What a model costs, by counting: kernels called, bytes kept for backward, modules walked."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Kernels(TorchDispatchMode):
    """Counts the kernels that compute, and the bytes of float32 they give."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.wide = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shares = isinstance(result, Tensor) and any(
            isinstance(a, Tensor) and a.data_ptr() == result.data_ptr() for a in args
        )
        if not shares or func._schema.is_mutable:  # what works in place computes too
            self.calls += 1
            if not shares and isinstance(result, Tensor) and result.dtype is torch.float32:
                self.wide += result.nbytes
        return result


def kernels(model: nn.Module, x: Tensor) -> Kernels:
    """What one run without gradients calls."""
    with torch.no_grad(), Kernels() as seen:
        model(x)
    return seen


def kept_for_backward(model: nn.Module, x: Tensor) -> float:
    """Bytes of distinct storages kept for backward that are no parameters, in units of x's."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (saved, storage.nbytes())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        assert model(x).requires_grad
    return sum(size for _, size in storages.values()) / x.nbytes


def bytes_kept(run: Callable[[], Tensor], *there: Tensor) -> int:
    """Bytes of distinct storages kept for backward, without those of some tensors."""
    known = {t.untyped_storage().data_ptr() for t in there}
    sizes: dict[int, tuple[int, Tensor]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        sizes[storage.data_ptr()] = (storage.nbytes(), saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = run()
    assert y.requires_grad
    return sum(size for at, (size, _) in sizes.items() if at not in known)


@contextlib.contextmanager
def walked() -> Iterator[list[int]]:
    """How many modules are passed by in walks through a model."""
    seen, original = [0], nn.Module.named_modules

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        caller = sys._getframe(1).f_code
        inner = caller.co_name == "named_modules"
        for item in original(self, *args, **kwargs):
            seen[0] += not inner
            yield item

    nn.Module.named_modules = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        nn.Module.named_modules = original  # type: ignore[method-assign]
