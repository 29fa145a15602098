"""The rows of one batch through different adapters on one frozen base: using_rows."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence

from torch import nn

from rankwise.attaching.records import Attachment, attachments
from rankwise.attaching.switching import activate, refuse_rivals, restored
from rankwise.errors import UserError, gather, nearest
from rankwise.layers import Routing

__all__ = ["using_rows"]

Way = str | None | Sequence[str]


@contextlib.contextmanager
def using_rows(model: nn.Module, names: Sequence[Way]) -> Generator[nn.Module]:
    """The model with each row of a batch going through adapters of its own.

        y_i = base(x)_i + Σ δ_a(x_i)    over the adapters a that are named for row i

    The frozen layers run once on the whole batch; an adapter's updates run on its rows alone, and
    so does its trained copy of a head. A row gives what it gives with its adapter alone (unless the
    base mixes rows, as batch normalisation does in training, or an adapter holds numbers that are
    not finite), and gradients flow to each adapter from its rows alone, so several of them, of
    different ranks and rates, train in one pass.

    Rows of one adapter that lie beside each other are read as a view, others are copied: sort a
    batch by its adapters. Backward may come after the block, but not where activations are
    checkpointed: then the forward pass is run again during it (torch notices the difference only
    with use_reentrant=False). The block changes the model itself, so only one thread may run it.

    Args:
        names: for each row of the batch the name of its adapter, None for the bare base with its
            own head, or several names, whose effects add up. Where a layer's input has a multiple
            of that many rows, as with (batch · time, features) or the beams of a search, a row's
            are those that lie beside each other.

    Inside the block, ``using``, ``base`` and another ``using_rows`` take over and give back when
    they end. What attaches, detaches, switches for good or merges is refused there.

    Raises:
        UserError: lists the names that no adapter has, adapters that act on whole batches alone
            (where a module reads its weights itself), and rows with two adapters that have a head
            each; or the model carries none, is merged, or trains as a whole. In the block, a layer
            whose input has other rows than were named.
    """
    ways = _ways(names)
    records = attachments(model)
    gather(UserError, "Rows of a batch through different adapters", list(_wrong(records, ways)))
    with restored(model):
        used = dict.fromkeys(name for way in ways for name in way)
        activate(model, used, Routing(ways))
        yield model


def _ways(names: Sequence[Way]) -> list[tuple[str, ...]]:
    if isinstance(names, str) or not names:
        raise UserError(
            f"using_rows takes a list with one adapter's name, or None, for each row of the batch; "
            f"got {names!r}."
        )
    return [() if n is None else (n,) if isinstance(n, str) else tuple(n) for n in names]


def _wrong(records: dict[str, Attachment], ways: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """What is wrong with the names of the rows, one sentence each."""
    for record in records.values():
        if not record.places and not record.copies:
            yield f"{type(record.method).__name__} trains the base itself, which is every row's."
    for name in dict.fromkeys(name for way in ways for name in way):
        if name not in records:
            yield (
                f"there is no adapter named '{name}'; the model carries {', '.join(records)}."
                f"{nearest(name, records)}"
            )
        elif fixed := records[name].batchwide:
            yield (
                f"'{name}' acts on whole batches alone at '{fixed[0]}'"
                f"{f' and {len(fixed) - 1} more places' if len(fixed) > 1 else ''}, where a module "
                "reads its weights itself or has the batch on another axis. Leave those out of the "
                "adapter, or run it by itself (rankwise.using)."
            )
    for way in dict.fromkeys(ways):
        try:
            refuse_rivals(records[name] for name in way if name in records)
        except UserError as error:
            yield str(error)
