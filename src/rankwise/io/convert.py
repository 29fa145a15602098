"""convert: an adapter from one file format to another, with a report of what was decided."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from rankwise.errors import EnvironmentFault, UserError, gather, nearest
from rankwise.io import diffusers, files, mlx
from rankwise.io.blueprint import Blueprint, blueprint
from rankwise.io.detect import FOLDERS, detect, home
from rankwise.io.diffusers import read_diffusers, write_diffusers
from rankwise.io.gguf import read_gguf, write_gguf
from rankwise.io.holding import FORMATS, READERS, Reader, demand
from rankwise.io.kohya import PREFIXES, read_kohya, write_kohya
from rankwise.io.loralib import Unsaid, read_loralib, write_loralib
from rankwise.io.mlx import read_mlx, write_mlx
from rankwise.io.peft import WEIGHTS, read_peft
from rankwise.io.peft_alone import read_peft_alone, write_peft_alone
from rankwise.io.peft_config import CONFIG
from rankwise.io.portable import Portable
from rankwise.io.reforms import fold, join_parts, one_rank, without_starts
from rankwise.io.state import CARD, TRAINED

__all__ = ["Wishes", "convert", "read_any", "read_on_model", "refuse_place"]

# The file that each format's folder gets; the first where there are two.
NAMES = {
    "peft": WEIGHTS,
    "loralib": "lora.pt",
    "mlx": mlx.WEIGHTS,
    "kohya": "lora.safetensors",
    "diffusers": diffusers.WEIGHTS,
    "gguf": "adapter.gguf",
}
_OURS = frozenset({CONFIG, CARD, TRAINED, *NAMES.values()})


@dataclass(frozen=True)
class Wishes:
    """What a conversion is told beyond from where and to what.

    Attributes:
        source: the format to read; told by the files when None.
        reader: the program that shall load PEFT's files, a key of READERS.
        base: folder or config.json of the base model.
        component: which model of a pipeline, by diffusers' name or kohya's prefix.
        max_rank: the largest rank that the reader is told to take.
        unsaid: what a file of loralib does not say.
        allow_pickle: open a pickle, as plain tensors.
        allow_nonfinite: let NaN and infinity pass.
    """

    source: str | None = None
    reader: str | None = None
    base: str | os.PathLike[str] | None = None
    component: str | None = None
    max_rank: int | None = None
    unsaid: Unsaid = field(default_factory=Unsaid)
    allow_pickle: bool = False
    allow_nonfinite: bool = False


def convert(
    path: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    wishes: Wishes | None = None,
) -> tuple[str, ...]:
    """Read an adapter in one format and write it in another into the folder ``out``.

    The update stays the same: what the target cannot express is folded, padded or joined exactly,
    and what it cannot hold at all is refused with the reason. ``out`` appears whole or not at all;
    an existing folder is replaced when it is empty or holds an adapter and nothing else.

    Returns the report, one sentence for each decision.

    Raises:
        UserError: something the target cannot hold, or that has to be said and was not.
        ArtifactError: lists all that is wrong with the files.
        EnvironmentFault: a package is missing, or the disk refuses.
    """
    wishes = wishes or Wishes()
    _known("to", to, FORMATS)
    reader = _reader(to, wishes)
    refuse_place(Path(out), Path(path))
    base = None if wishes.base is None else blueprint(wishes.base)
    portable = read_any(path, wishes, base)
    if reader is not None:
        portable = _for(portable, reader, wishes.max_rank)
    with files.folder(out) as inside:
        written = _write(portable, to, inside, wishes.component, base)
    return (*written.notes, f"wrote {_counted(written)} to '{Path(out) / NAMES[to]}' ({to})")


def read_any(
    path: str | os.PathLike[str], wishes: Wishes | None = None, base: Blueprint | None = None
) -> Portable:
    """Read an adapter in whichever of the formats it is; its first note says in which.

    Raises:
        UserError: there is nothing, nothing known, or something has to be said.
        ArtifactError: lists all that is wrong with the files.
        EnvironmentFault: a package is missing, or a file cannot be read.
    """
    wishes = wishes or Wishes()
    if wishes.source is None:
        source, place = detect(path)
    else:
        _known("from", wishes.source, FORMATS)
        source, place = wishes.source, home(path)
    finite = wishes.allow_nonfinite
    read: Mapping[str, Callable[[], Portable]] = {
        "peft": lambda: read_peft_alone(
            place, base=base, allow_pickle=wishes.allow_pickle, allow_nonfinite=finite
        ),
        "loralib": lambda: read_loralib(
            place,
            wishes.unsaid,
            base=base,
            allow_pickle=wishes.allow_pickle,
            allow_nonfinite=finite,
        ),
        "mlx": lambda: read_mlx(place, base=base, allow_nonfinite=finite),
        "kohya": lambda: read_kohya(
            place,
            () if base is None else base.names,
            component=wishes.component,
            allow_nonfinite=finite,
        ),
        "diffusers": lambda: read_diffusers(
            place, component=_model(wishes.component), allow_nonfinite=finite
        ),
        "gguf": lambda: read_gguf(place, base=base, allow_nonfinite=finite),
    }
    if place.is_dir() != (source in FOLDERS) and source != "diffusers":
        kind = "folder" if source in FOLDERS else "file"
        raise UserError(f"'{place}' is no {kind}, and an adapter of {source} is one.")
    portable = read[source]()
    told = f"read {_counted(portable)} from '{place}' ({source})"
    return replace(portable, notes=(told, *portable.notes))


def read_on_model(path: str | os.PathLike[str], model: nn.Module, wishes: Wishes) -> Portable:
    """:func:`read_any` for PEFT's folder of an adapter that only its model tells.

    ``model`` is the base; it is only looked at.

    Raises:
        UserError, ArtifactError, EnvironmentFault: as of :func:`rankwise.io.peft.read_peft`.
    """
    place = home(path)
    adapter = read_peft(
        place, model, allow_nonfinite=wishes.allow_nonfinite, allow_pickle=wishes.allow_pickle
    )
    return Portable(adapter, notes=(f"read from '{place}' on the model",))


def _write(
    portable: Portable, to: str, inside: Path, component: str | None, base: Blueprint | None
) -> Portable:
    if to == "gguf":
        if base is None:
            raise UserError(
                "A GGUF adapter names the architecture of its base, and the rows of Llama's query "
                "and key lie in it by head. Give the base or its config.json: --base FOLDER."
            )
        return write_gguf(portable, inside / NAMES[to], base=base)
    write: Mapping[str, Callable[[], Portable]] = {
        "peft": lambda: write_peft_alone(portable, inside),
        "loralib": lambda: write_loralib(portable, inside / NAMES[to]),
        "mlx": lambda: write_mlx(portable, inside, base=base),
        "kohya": lambda: write_kohya(portable, inside / NAMES[to], component=component),
        "diffusers": lambda: write_diffusers(portable, inside, component=_model(component)),
    }
    return write[to]()


def _for(portable: Portable, reader: Reader, max_rank: int | None) -> Portable:
    """The adapter so that this reader of PEFT's files computes the same."""
    demand(portable, reader)
    portable = join_parts(without_starts(portable))
    method = portable.adapter.method
    used = {
        "rank_pattern": len({f.r for f in portable.factors.values()}) > 1,
        "alpha_pattern": bool(method.alpha_pattern),
        "use_rslora": method.rank_stabilized,
    }
    passed = [key for key in reader.ignores if used[key]]
    if passed:
        portable = fold(portable, f"{' and '.join(passed)} mean nothing to {reader.name}")
        portable = one_rank(portable, f"rank_pattern means nothing to {reader.name}")
    else:
        portable = portable.noting(f"scale: right for {reader.name} as it is, nothing was folded")
    largest = max(f.r for f in portable.factors.values())
    limit = max_rank or reader.max_rank
    if limit is not None and largest > limit:
        raise UserError(
            f"The adapter has rank {largest}, and {reader.name} takes {limit} at most unless it is "
            f"started with {reader.rank_option} {largest}. Where it is, say so: --max-rank "
            f"{largest}."
        )
    return portable.noting(*([reader.note] if portable.adapter.modules and reader.note else []))


def _reader(to: str, wishes: Wishes) -> Reader | None:
    if wishes.reader is None:
        return None
    _known("for", wishes.reader, READERS)
    if to != "peft":
        raise UserError(
            f"{READERS[wishes.reader].name} reads PEFT's files, so --for {wishes.reader} goes "
            f"with --to peft, not {to}."
        )
    return READERS[wishes.reader]


def _known(option: str, word: str, words: Mapping[str, object]) -> None:
    if word not in words:
        listed = ", ".join(words)
        raise UserError(f"{option} (--{option}) must be one of {listed}.{nearest(word, words)}")


def _model(component: str | None) -> str | None:
    """diffusers' name of a component that may be given by kohya's prefix."""
    return PREFIXES.get(component, component) if component is not None else None


def refuse_place(out: Path, *sources: Path) -> None:
    """Only a new or empty folder, or one with an adapter alone that is none of the sources.

    Raises:
        UserError: it is something else.
        EnvironmentFault: it cannot be looked into.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; name a folder.")
    real = out.resolve()
    for held in (source.resolve() for source in sources):
        if real == held or real in held.parents:
            raise UserError(f"'{out}' holds an adapter that is read; name another folder.")
    try:
        names = sorted(entry.name for entry in out.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise EnvironmentFault(f"'{out}' cannot be looked into: {error.strerror}.") from error
    foreign = [f"'{name}'" for name in names if name not in _OURS]
    title = f"'{out}' holds other files, and it would be replaced as a whole; name a new folder"
    gather(UserError, title, [", ".join(foreign[:5])] if foreign else [])


def _counted(portable: Portable) -> str:
    ranks = sorted({f.r for f in portable.factors.values()})
    scales = sorted({float(f"{f.scale:.6g}") for f in portable.factors.values()})
    r = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    s = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    return f"{len(portable.factors)} updates of rank {r}, scale {s},"
