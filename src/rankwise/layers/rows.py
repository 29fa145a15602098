"""Which rows of a batch go through which adapters: groups of rows, taken apart and joined again."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.kernels import BatchRows

__all__ = ["ByRows", "Groups", "Routing", "RowsDiffer"]

K = TypeVar("K", bound=Hashable)


class Groups(Generic[K]):
    """The rows of a batch by what they have in common.

    Args:
        keys: what each row has, at least one row.

    Attributes:
        rows: those of each key, in the order in which the keys occur.
    """

    def __init__(self, keys: Sequence[K]) -> None:
        numbers: dict[K, list[int]] = {}
        for i, key in enumerate(keys):
            numbers.setdefault(key, []).append(i)
        self.count = len(keys)
        self.rows = {key: BatchRows(own, self.count) for key, own in numbers.items()}
        there = {n: place for place, n in enumerate(n for own in numbers.values() for n in own)}
        self._order = BatchRows([there[i] for i in range(self.count)], self.count)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of all groups, given group by group, in the batch's own order."""
        return self._order.pick(torch.cat(list(parts)))

    def fit(self, shape: torch.Size, own: int, who: str) -> None:
        """See to it that the first axis of an input counts these rows.

        Args:
            own: how many of the last axes are those of one position.

        Raises:
            UserError: it is no multiple of their number, or the second seems to count them.
        """
        n, batch = self.count, shape[: len(shape) - own]
        if not batch or batch[0] % n:
            what = f"must be the {n} rows of the batch that were named, or a multiple of them"
        elif len(batch) > 1 and batch[0] != n == batch[1] > 1:
            what = f"must be the batch, and here the second is that of the {n} rows that were named"
        else:
            return
        raise UserError(
            f"{who} was given an input of shape {tuple(shape)}: its first axis {what}. "
            "rankwise.using_rows takes one name for each row of the batch, and serves models whose "
            "layers see the rows one after the other."
        )


class Routing(Groups[tuple[str, ...]]):
    """Which adapters each row of a batch goes through; none is the bare base.

    Attributes:
        ways: the names of each row's adapters, whose effects add up.
        by_adapter: the rows of each adapter.
    """

    def __init__(self, ways: Sequence[tuple[str, ...]]) -> None:
        super().__init__(ways)
        self.ways = tuple(ways)
        names = dict.fromkeys(name for way in ways for name in way)
        self.by_adapter = {
            name: BatchRows([i for i, way in enumerate(ways) if name in way], len(ways))
            for name in names
        }


_CACHES = ("past_key_values", "past_key_value")  # as transformers names them


class ByRows(nn.Module):
    """Several versions of a module as one, each run on its rows: y_i = m_i(x_i).

    Tensors with as many rows as the first are taken apart; other arguments go to every version.

    Args:
        chosen: the version for each row of the batch.
    """

    def __init__(self, chosen: Sequence[nn.Module]) -> None:
        super().__init__()
        self.groups = Groups(chosen)
        self.versions = nn.ModuleList(self.groups.rows)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        kind = type(self.versions[0]).__name__
        if any(named.get(name) is not None for name in _CACHES):
            raise UserError(
                f"{kind} is trained whole by several adapters, and would keep the keys and values "
                "of all their rows in one cache. Call the model with use_cache=False, or run the "
                "adapters one after the other (rankwise.using)."
            )
        tensors = [v for v in (*inputs, *named.values()) if isinstance(v, Tensor)]
        if not tensors:
            raise UserError(f"{kind} takes no tensor, and differs from row to row.")
        first = tensors[0]
        self.groups.fit(first.shape, int(first.is_floating_point()), kind)

        def of(rows: BatchRows, value: Any) -> Any:
            whole = not isinstance(value, Tensor) or value.shape[:1] != first.shape[:1]
            return value if whole else rows.pick(value)

        parts: list[Any] = []
        for module, rows in self.groups.rows.items():
            mine = {name: of(rows, value) for name, value in named.items()}
            parts.append(module(*(of(rows, value) for value in inputs), **mine))
        if not all(isinstance(part, Tensor) for part in parts):
            raise UserError(
                f"The trained copies of {kind} give more than one tensor, so the rows of a batch "
                "cannot each have their own."
            )
        if len({part.shape[1:] for part in parts}) > 1:
            sizes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise UserError(
                f"The trained copies of {kind} give outputs of different sizes ({sizes}), which "
                "cannot be the rows of one batch. Run them one after the other (rankwise.using)."
            )
        return self.groups.join(parts)


class RowsDiffer(Tensor):
    """Stands for a weight that is another one for each row: it has a shape, and no numbers.

    Owners may ask for its shape, dtype and device. torch's encoder layer calls its layers, and
    does not read their weights, when it sees it.
    """

    @classmethod
    def of(cls, weight: Tensor) -> RowsDiffer:
        """What stands for a weight like this one."""
        return weight.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _ASKED:
            raise UserError(
                "A weight was read by its owner, and with rankwise.using_rows it is another one "
                "for each row of the batch. Leave that layer out of the adapters, or run them one "
                "after the other (rankwise.using)."
            )
        return super().__torch_function__(func, types, args, kwargs)


_PROPERTIES = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_meta")
_ASKED = {inspect.getattr_static(Tensor, name).__get__ for name in _PROPERTIES}
_ASKED |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}
