"""Counts the bytes of every tensor that is alive while code runs, and what they are for."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Live", "Part", "Peak"]


class Part(enum.Enum):
    """What memory is for."""

    WEIGHTS = "weights"
    PACKED = "packed copies"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimiser state"
    LOGITS = "logits and loss"
    ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Peak:
    """What was held at the moment when most was.

    Attributes:
        parts: bytes of each part at that moment.
        busiest: the most bytes of activations at any moment, not only then.
    """

    parts: Mapping[Part, int]
    busiest: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


class Live(TorchDispatchMode):
    """While it is on, every storage that an operation makes is counted until it is freed.

    A storage counts once, however many tensors look at it. What an operation holds inside itself
    and frees before it returns is not seen. Tensors have no data here (FakeTensorMode), so where
    code asks for the number in one, it gets 1: finite, and true.

    ``phase`` is what newly made storages are for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = Part.ACTIVATIONS
        self._bytes = dict.fromkeys(Part, 0)
        self._peak: Mapping[Part, int] = dict(self._bytes)
        self._busiest = 0
        self._entries: dict[int, tuple[Part, int, weakref.ref[Any]]] = {}

    @property
    def peak(self) -> Peak:
        """What was held at the moment when most was, since :meth:`begin`."""
        return Peak(self._peak, self._busiest)

    def begin(self) -> None:
        """Look for the peak from here on."""
        self._peak, self._busiest = dict(self._bytes), self._bytes[Part.ACTIVATIONS]

    def mark(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Say what these tensors are for; those not seen before are counted from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            entry = self._entries.get(id(storage))
            if entry is None:
                self._hold(storage, part)
            else:
                self._bytes[entry[0]] -= entry[1]
                self._bytes[part] += entry[1]
                self._entries[id(storage)] = (part, *entry[1:])

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._entries:
                    self._hold(storage, self.phase)
        return made

    def _hold(self, storage: torch.UntypedStorage, part: Part) -> None:
        key, size = id(storage), storage.nbytes()
        self._entries[key] = (part, size, weakref.ref(storage, lambda _: self._free(key)))
        self._bytes[part] += size
        self._busiest = max(self._busiest, self._bytes[Part.ACTIVATIONS])
        if sum(self._bytes.values()) > sum(self._peak.values()):
            self._peak = dict(self._bytes)

    def _free(self, key: int) -> None:
        part, size, _ = self._entries.pop(key)
        self._bytes[part] -= size
