"""What Rankwise notes in the metadata of a PEFT file, so that reading it gives the same adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

from torch import Tensor

from rankwise.errors import ArtifactError, RankwiseError
from rankwise.io.tensors import strict_json
from rankwise.layers import Split
from rankwise.lowrank import Factors, scaling

__all__ = ["METADATA_KEY", "Notes", "Share"]

METADATA_KEY = "rankwise.layout"
_VERSION = 1
_MOST = 1 << 31  # of any whole number here

Value = TypeVar("Value")


@dataclass(frozen=True)
class Share:
    """Which part of an update in the file is the update of one adapted name.

    Attributes:
        r: its rank.
        alpha: its α.
        rows: of the file's A, from the first to behind the last; the same columns of B.
        start: how many of these, at the end, are the start A0 and −B0.
    """

    r: int
    alpha: float
    rows: tuple[int, int]
    start: int = 0

    def scale(self, rank_stabilized: bool) -> float:
        """s of this rank and α."""
        return scaling(self.r, self.alpha, rank_stabilized)

    def factors(self, A: Tensor, B: Tensor, scale: float) -> Factors:
        """The update of A and B in these rows of the file, with its start apart."""
        if not self.start:
            return Factors(A, B, scale)
        r = self.r
        return Factors(
            A[..., :r, :].contiguous(),
            B[..., :r].contiguous(),
            scale,
            A[..., r:, :].contiguous(),
            -B[..., r:].contiguous(),
        )


@dataclass(frozen=True)
class Notes:
    """What a PEFT folder cannot say. PEFT and all other readers work without it.

    Attributes:
        shares: of each adapted name whose update is not by itself in the file, or not of its rank.
        split: the parts of fused projections that have shares, by module.
        own: adapted names whose tensors have Rankwise's own shapes, as PEFT has none for them.
        tied: modules whose update is another's, in the file once more for PEFT, and whose it is.
        biases: the changed biases by full parameter name; None where PEFT's rule tells which.
        tokens: embeddings with trained rows by their name in the configuration, where that means
            other modules as well.
        freeze_A: as of the method.
        dropout: as of the method, where PEFT must be told 0.
        slot: as of the method.
    """

    shares: Mapping[str, Share] = field(default_factory=dict[str, Share])
    split: Mapping[str, Split] = field(default_factory=dict[str, Split])
    own: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict[str, str])
    biases: tuple[str, ...] | None = None
    tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    freeze_A: bool = False
    dropout: float = 0.0
    slot: int | None = None

    def to_json(self) -> str | None:
        """As one line of JSON; None when there is nothing to say."""
        raw: dict[str, object] = {
            "shares": {
                name: [share.r, share.alpha, *share.rows, share.start]
                for name, share in self.shares.items()
            },
            "split": {
                name: [list(split.names), split.sizes and list(split.sizes), split.heads]
                for name, split in self.split.items()
            },
            "own": list(self.own),
            "tied": dict(self.tied),
            "biases": self.biases and list(self.biases),
            "tokens": dict(self.tokens),
            "freeze_A": self.freeze_A,
            "dropout": self.dropout,
            "slot": self.slot,
        }
        said = {key: value for key, value in raw.items() if value}
        return json.dumps({"version": _VERSION, **said}, separators=(",", ":")) if said else None

    @staticmethod
    def from_json(text: str | None, where: str) -> Notes:
        """Read what :meth:`to_json` wrote; None gives what PEFT's own files say.

        Raises:
            ArtifactError: it is something else.
        """
        if text is None:
            return Notes()
        what = f"the entry '{METADATA_KEY}'"
        raw = strict_json(text.encode("utf-8", "replace"), where, what)
        if raw.get("version") != _VERSION:
            raise ArtifactError(
                f"{where}: {what} is not of version {_VERSION}. A newer Rankwise wrote it, or "
                "something else."
            )
        try:
            biases = raw.get("biases")
            return Notes(
                shares=_by_name(raw.get("shares", {}), _share),
                split=_by_name(raw.get("split", {}), _split),
                own=_names(raw.get("own", [])),
                tied=_by_name(raw.get("tied", {}), _name),
                biases=None if biases is None else _names(biases),
                tokens=_by_name(raw.get("tokens", {}), _name),
                freeze_A=raw.get("freeze_A", False) is True,
                dropout=_number(raw.get("dropout", 0.0)),
                slot=None if raw.get("slot") is None else _whole(raw["slot"]),
            )
        except (_Damaged, RankwiseError) as error:
            raise ArtifactError(f"{where}: {what} is damaged: {error}") from error


class _Damaged(Exception):
    """A value that is not what it must be."""


def _by_name(value: object, read: Callable[[object], Value]) -> dict[str, Value]:
    if not isinstance(value, dict):
        raise _Damaged(f"{type(value).__name__} in the place of an object.")
    return {name: read(each) for name, each in cast("dict[str, object]", value).items()}


def _list(value: object, length: int | None = None) -> list[object]:
    if not isinstance(value, list) or length not in (None, len(cast("list[object]", value))):
        raise _Damaged(f"{type(value).__name__} in the place of a list of {length or 'names'}.")
    return cast("list[object]", value)


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise _Damaged(f"{type(value).__name__} in the place of a name.")
    return value


def _names(value: object) -> tuple[str, ...]:
    return tuple(_name(each) for each in _list(value))


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST:
        raise _Damaged("a number is not whole, or not from 0.")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _Damaged(f"{type(value).__name__} in the place of a number.")
    if not abs(value) <= _MOST or not math.isfinite(value):
        raise _Damaged("a number is not finite.")
    return float(value)


def _share(value: object) -> Share:
    r, alpha, low, high, start = _list(value, 5)
    share = Share(_whole(r), _number(alpha), (_whole(low), _whole(high)), _whole(start))
    if share.r < 1 or share.alpha <= 0 or share.rows[1] - share.rows[0] != share.r + share.start:
        raise _Damaged("ranks and rows do not add up.")
    return share


def _split(value: object) -> Split:
    names, sizes, heads = _list(value, 3)
    whole = None if sizes is None else tuple(_whole(size) for size in _list(sizes))
    return Split(_names(names), whole, _whole(heads))
