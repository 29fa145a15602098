"""combine_folders: adapters in files of any format as one of PEFT's folders, with no model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import ArtifactError, UserError, gather
from rankwise.io.blueprint import blueprint
from rankwise.io.convert import Wishes, read_any, refuse_place
from rankwise.io.detect import home
from rankwise.io.peft_alone import write_peft_alone
from rankwise.io.portable import Portable
from rankwise.io.sketch import Sketch, alike, contrast
from rankwise.methods.combining import Combination, Combined, Concatenate, combine

__all__ = ["CombinedFolder", "combine_folders"]

_SUM = Concatenate()


@dataclass(frozen=True)
class CombinedFolder:
    """What was written, and what to tell of it.

    Attributes:
        combined: the adapter, with its errors by adapted name.
        notes: what was decided on the way, one sentence each.
    """

    combined: Combined
    notes: tuple[str, ...]


def combine_folders(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    how: Combination = _SUM,
    *,
    head: str | os.PathLike[str] | None = None,
    wishes: Wishes | None = None,
) -> CombinedFolder:
    """Combine adapters and write the result in PEFT's format: see :func:`combine`.

    They are read as :func:`rankwise.io.convert.read_any` reads them, in any format. Where the files
    tell of their bases (Rankwise's sketch, layers that are embeddings or convolutions), they must
    tell the same. The result is for the base that the files name. ``out`` appears whole or not at
    all; an existing folder is replaced when it is empty or holds an adapter and nothing else.

    Args:
        folders: or files, of the adapters.
        out: where.
        weights: w_i, each 1 when not given.
        how: how the updates of one weight become one.
        head: the one of the folders whose modules that trained whole are kept.
        wishes: what the files do not say, for all of them alike: the base model, which tells what
            was added to biases, loralib's α, and whether a pickle may be opened.

    Raises:
        UserError: lists what keeps the adapters from being combined, or cannot be written.
        ArtifactError: lists all that is wrong with the files, or they were made on other bases.
        EnvironmentFault: a file cannot be read, or the disk refuses.
    """
    refuse_place(Path(out), *map(Path, folders))
    wishes = wishes or Wishes()
    plan = None if wishes.base is None else blueprint(wishes.base)
    places = [home(folder) for folder in folders]
    kept = None if head is None else _kept(Path(head), folders, places)
    read = [read_any(place, wishes, plan) for place in places]
    names = [f"'{place}'" for place in places]
    gather(ArtifactError, "The adapters are not of one base", [*_strangers(read, names)])
    adapters = [portable.adapter for portable in read]
    combined = combine(adapters, weights, how, head=kept, names=names)
    notes = [
        f"{name}: {note}" for name, each in zip(names, read, strict=True) for note in each.notes[1:]
    ]
    bases = list(dict.fromkeys(p.base for p in read if p.base is not None))
    if len(bases) > 1:
        notes.append(f"base: the files call it {', '.join(bases)}; the first is written")
    written = write_peft_alone(_together(combined, read, kept, bases), out)
    return CombinedFolder(combined, (*notes, *written.notes))


def _kept(head: Path, folders: Sequence[str | os.PathLike[str]], places: Sequence[Path]) -> int:
    """Which of the adapters the modules are kept of, by its folder or by what was asked for."""
    for i, (folder, place) in enumerate(zip(folders, places, strict=True)):
        if head.resolve() in (Path(folder).resolve(), place.resolve()):
            return i
    raise UserError(
        f"head names the adapter whose modules are kept, one of "
        f"{', '.join(map(str, places))}; got '{head}'."
    )


def _strangers(read: Sequence[Portable], names: Sequence[str]) -> Iterator[str]:
    """What the files tell of their bases that cannot be of one."""
    first: dict[str, tuple[str, object]] = {}
    sketches: dict[str, tuple[str, tuple[float, ...]]] = {}
    parts = {p.component: who for who, p in zip(names, read, strict=True) if p.component}
    if len(parts) > 1:
        told = ", ".join(f"{who} for '{component}'" for component, who in parts.items())
        yield f"They are for different models of a pipeline: {told}."
    for who, portable in zip(names, read, strict=True):
        for name, kind in _kinds(portable).items():
            other, before = first.setdefault(name, (who, kind))
            if before != kind:
                yield f"'{name}' is {before} in {other} and {kind} in {who}."
        told = _sketch(portable, who)
        unlike: list[str] = []
        for name, values in told.items():
            other, known = sketches.setdefault(name, (who, values))
            f = portable.factors.get(name)
            size = 1 if f is None else f.out_features * f.in_features
            if not alike(known, values, size):
                before, now = contrast(known, values)
                unlike.append(f"'{name}' has {before} in {other} and {now}")
        if unlike:
            yield (
                f"{who} was made on other weights: {unlike[0]} there ({len(unlike)} of "
                f"{len(told)} weights differ)."
            )


def _kinds(portable: Portable) -> dict[str, str]:
    """The kind of each adapted layer, in words, as far as the file tells."""
    found: dict[str, str] = {}
    for name in portable.factors:
        kernel = portable.kernels.get(name)
        if name in portable.embeddings:
            found[name] = "an embedding"
        elif kernel is not None:
            grouped = f" in {kernel.groups} groups" if kernel.groups > 1 else ""
            found[name] = f"a convolution of {' x '.join(map(str, kernel.shape))}{grouped}"
        else:
            found[name] = "a linear layer"
    return found


def _sketch(portable: Portable, who: str) -> Mapping[str, tuple[float, ...]]:
    return {} if portable.sketch is None else Sketch.from_json(portable.sketch, who).modules


def _together(
    combined: Combined, read: Sequence[Portable], kept: int | None, bases: Sequence[str]
) -> Portable:
    """The combined adapter with what the files say of the layers and of the base."""
    base = next(iter(bases), None)
    modules = {n: v for i, p in enumerate(read) for n, v in _sketch(p, str(i)).items()}
    tasks = {p.task_type for p in (read if kept is None else read[kept : kept + 1])}
    factors = combined.adapter.factors
    kernels = {n: k for portable in read for n, k in portable.kernels.items() if n in factors}
    return Portable(
        combined.adapter,
        embeddings=frozenset(n for p in read for n in p.embeddings if n in factors),
        kernels=kernels,
        transposed=all(portable.transposed for portable in read),
        base=base,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        sketch=Sketch(base, modules).to_json() if modules else None,
    )
