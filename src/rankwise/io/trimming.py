"""trim_adapter: an adapter in any format cut to fewer ranks, as PEFT's folder."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from rankwise.io.adapters import save_adapter
from rankwise.io.blueprint import blueprint
from rankwise.io.convert import Wishes, read_any, read_on_model, refuse_place
from rankwise.io.detect import home
from rankwise.io.holding import FORMATS, demand
from rankwise.io.peft_alone import write_peft_alone
from rankwise.io.peft_alone_keys import ON_MODEL, ModelNeeded
from rankwise.io.portable import Portable
from rankwise.methods.trimming import Prefix, Trimmed, trim
from rankwise.spectrum import Energy, MaxError, Promise

__all__ = ["TrimmedFolder", "trim_adapter", "trim_on_model"]


@dataclass(frozen=True)
class TrimmedFolder:
    """What was read, what became of it, and what to tell.

    Attributes:
        before: the adapter as it was read.
        trimmed: the cut adapter with its errors.
        notes: what was decided on the way, one sentence each.
    """

    before: Portable
    trimmed: Trimmed
    notes: tuple[str, ...]


def trim_adapter(
    path: str | os.PathLike[str],
    promise: Promise | Prefix,
    out: str | os.PathLike[str],
    wishes: Wishes | None = None,
) -> TrimmedFolder:
    """Cut an adapter to the ranks that a promise asks for and write it as PEFT's folder.

    See :func:`rankwise.methods.trimming.trim`. Every update gets scale 1: lora_alpha is r, in
    rank_pattern and alpha_pattern alike, so that a reader that passes over the patterns still
    computes with the right scale; a prefix keeps its own. Cut factors are in float32 at least, so
    that rounding does not break the promise; those of a prefix are the file's own numbers. ``out``
    appears whole or not at all; an existing folder is replaced when it is empty or holds an adapter
    and nothing else.

    Raises:
        UserError: the promise cannot be kept, or PEFT's files cannot hold the adapter.
        ModelNeeded: only the model tells what the adapter is, see :func:`trim_on_model`.
        ArtifactError: lists all that is wrong with the files.
        EnvironmentFault: a file cannot be read, or the disk refuses.
    """
    wishes = wishes or Wishes()
    refuse_place(Path(out), Path(path))
    base = None if wishes.base is None else blueprint(wishes.base)
    before = read_any(path, wishes, base)
    _refuse(before, promise)
    demand(before, FORMATS["peft"])
    made = trim(before.adapter, promise)
    kept = set(made.adapter.factors)
    after = replace(
        before,
        adapter=made.adapter,
        embeddings=before.embeddings & kept,
        kernels={n: k for n, k in before.kernels.items() if n in kept},
    )
    notes = (*_told(before, made, promise), *_served(made, out))
    written = write_peft_alone(after.noting(*notes), out)
    return TrimmedFolder(before, made, written.notes)


def trim_on_model(
    path: str | os.PathLike[str],
    promise: Promise | Prefix,
    out: str | os.PathLike[str],
    model: nn.Module,
    wishes: Wishes | None = None,
) -> TrimmedFolder:
    """:func:`trim_adapter` for PEFT's folder of an adapter that only its model tells.

    Such are banks of experts, nn.MultiheadAttention, rows of embeddings, biases of layers that are
    not adapted, and one update of two tied layers. ``model`` is the base; it is only looked at.

    Raises:
        UserError, ArtifactError, EnvironmentFault: as of :func:`trim_adapter`, and where the
            adapter does not fit the model.
    """
    refuse_place(Path(out), home(path))
    before = read_on_model(path, model, wishes or Wishes())
    made = trim(before.adapter, promise)
    save_adapter(model, out, adapter=made.adapter)
    return TrimmedFolder(before, made, (*before.notes, *_told(before, made, promise)))


def _refuse(before: Portable, promise: Promise | Prefix) -> None:
    """What a file can hold and cannot be cut in by itself."""
    remedy = f"Cut it {ON_MODEL}."
    if before.adapter.method.tied:
        raise ModelNeeded(
            "The adapter holds one update of two tied layers, and only the model ties them. "
            f"{remedy}"
        )
    if isinstance(promise, Prefix) and before.fused:
        raise ModelNeeded(
            f"The parts of '{before.fused[0]}' are one update in the file, so its first ranks are "
            f"not the first of each part. {remedy}"
        )


def _told(before: Portable, made: Trimmed, promise: Promise | Prefix) -> list[str]:
    """What a user of the cut adapter should know."""
    notes = [*_widened(before, made), *_rounded(made, promise)]
    gone = [name for name, cut in made.cuts.items() if not cut.after]
    if gone:
        notes.append(
            f"rank 0: {len(gone)} updates are left out ('{gone[0]}'"
            + (f" and {len(gone) - 1} more" if len(gone) > 1 else "")
            + "), as target_modules cannot name a rank of 0"
        )
    if made.adapter.magnitudes:
        notes.append(
            "DoRA: the errors are those of δ, before the rows are scaled to the magnitudes"
        )
    return notes


def _served(made: Trimmed, out: str | os.PathLike[str]) -> Iterator[str]:
    """What a server may pass over."""
    ranks = {f.r for f in made.adapter.factors.values()}
    if len(ranks) > 1:
        yield (
            f"ranks differ ({min(ranks)} to {max(ranks)}): PEFT reads rank_pattern; for a server "
            f"that does not: rankwise convert {out} --to peft --for vllm --out FOLDER"
        )


def _widened(before: Portable, made: Trimmed) -> Iterator[str]:
    """Where cut factors are in a longer dtype than those of the file."""
    first, last = (
        {str(f.B.dtype).removeprefix("torch.") for f in each.factors.values()}
        for each in (before, made.adapter)
    )
    if short := sorted(first - last):
        yield (
            f"{', '.join(sorted(last))}: the file had {', '.join(short)}, and to round the cut "
            "factors to it would add an error of its own; a number takes more bytes now"
        )


def _rounded(made: Trimmed, promise: Promise | Prefix) -> Iterator[str]:
    """Ranks are chosen by singular values in float64, and the factors are rounded after that."""
    allowed = None
    if isinstance(promise, MaxError):
        allowed = promise.error
    elif isinstance(promise, Energy):
        allowed = math.sqrt(1 - promise.share)
    if allowed is not None and made.error > allowed:
        dtypes = {str(f.B.dtype).removeprefix("torch.") for f in made.adapter.factors.values()}
        yield (
            f"rounding: the ranks keep the promise, and rounded to {', '.join(sorted(dtypes))} the "
            f"factors have an error of {made.error:.3g}, where {allowed:.3g} was asked for"
        )
