"""The folder of a comparison: its options pinned, its rows split and written down, once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.data.examples import Examples
from rankwise.errors import ArtifactError, UserError, gather, nearest
from rankwise.io import files
from rankwise.lab.compare.grid import Grid
from rankwise.lab.compare.options import OF_THE_GRID, SHARED, CompareConfig, make_compare, merge
from rankwise.lab.compare.rows import Part, cut, intact, write_rows
from rankwise.train.config import FitConfig, make_config
from rankwise.train.metrics import main_metric
from rankwise.train.precision import choose_device
from rankwise.train.reporter import Reporter
from rankwise.train.setup import load_data

__all__ = ["NAME", "Pinned", "begin", "find_rows", "pin", "read_pinned"]

NAME = "compare.json"
_KIND, _FORMAT = "rankwise compare", 1
_WHERE = "The options of rankwise compare"
_BEFORE = {"data", "run.lock"}  # what is there before the options are pinned
_OF_ROWS = frozenset({"data", "eval", "eval_fraction", "limit"})


@dataclass(frozen=True)
class Pinned:
    """What a comparison holds to from its beginning on.

    Attributes:
        folder: where it stands.
        given: the options of fit that the user gave.
        settled: what followed from the data and the machine: task, metric, device, dtype.
        config: what is compared.
        labels: how many classes there are; 0 where the labels are no classes.
        parts: the files of rows by name: train, eval, search-train, search-eval.
        notes: where the rows came from, and what reading them had to say.
    """

    folder: Path
    given: Mapping[str, Any]
    settled: Mapping[str, str]
    config: CompareConfig
    labels: int
    parts: Mapping[str, Part]
    notes: tuple[str, ...]

    @property
    def shared(self) -> dict[str, Any]:
        """The options that every run has; their rows come from the comparison's own files."""
        own = {k for k in self.given if k in _OF_ROWS or k.endswith("_column")}
        return {k: v for k, v in self.given.items() if k not in own} | dict(self.settled)

    @property
    def about(self) -> str:
        """The model and the data in a few words: the last parts of their paths."""
        model, data = (re.split(r"[/\\]+", str(self.given[k])) for k in ("model", "data"))
        return f"{[p for p in model if p][-1]} on {'/'.join(data[-2:])}"

    @property
    def grid(self) -> Grid:
        """Everything that is to be run."""
        rows = {name: part.rows for name, part in self.parts.items()}
        return Grid(self.folder, self.config, self.shared, rows)

    @property
    def metric(self) -> str:
        """What runs and searches are judged by."""
        return self.settled["metric"]


def begin(
    folder: Path, given: Mapping[str, Any], compared: Mapping[str, Any], watcher: Reporter
) -> Pinned:
    """Begin a comparison in a folder, or find the one that is to go on; :func:`pin` settles it.

    A new one reads and splits the rows and writes them below ``data/``; every run reads these
    files, so that nothing depends on what becomes of the user's own. One that goes on needs no
    option; those that are given must be its own, except that methods, ranks and seeds may grow, and
    that the same rows may have moved to other files.

    Args:
        folder: of the comparison.
        given: options of fit, checked by :func:`rankwise.train.config.make_config`.
        compared: fields of :class:`rankwise.lab.compare.options.CompareConfig`.
        watcher: told what reading the rows has to say.

    Raises:
        UserError: options or rows that cannot be used, options that may not change, or a folder
            that holds something else.
        ArtifactError: the folder's own files are damaged.
    """
    if folder.is_file():
        raise UserError(f"--out {folder} is a file; name a folder.")
    if (folder / NAME).exists():
        return _grown(read_pinned(folder), given, compared)
    if folder.is_dir() and any(entry.name not in _BEFORE for entry in folder.iterdir()):
        raise UserError(f"'{folder}' is not empty, and holds no comparison. Name another --out.")
    return _fresh(folder, _checked(given), make_compare(compared, _WHERE), watcher)


def pin(pinned: Pinned) -> None:
    """Write down what a comparison holds to; :func:`read_pinned` reads it."""
    tree = {"format": _FORMAT, "kind": _KIND, **asdict(pinned)}
    tree |= {"config": pinned.config.model_dump(mode="json")}
    del tree["folder"]
    files.write_json(pinned.folder / NAME, tree)


def read_pinned(folder: Path) -> Pinned:
    """The comparison in a folder.

    Raises:
        UserError: there is none.
        ArtifactError: compare.json is damaged.
    """
    path = folder / NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["kind"] != _KIND or tree["format"] != _FORMAT:
            raise ArtifactError(f"'{path}' is not a comparison that this version reads.")
        pinned = Pinned(
            folder=folder,
            given=dict(tree["given"]),
            settled=dict(tree["settled"]),
            # an option that came later is off in what was begun before it
            config=CompareConfig.model_validate({"search_head": False, **tree["config"]}),
            labels=int(tree["labels"]),
            parts={name: Part(**part) for name, part in tree["parts"].items()},
            notes=tuple(tree["notes"]),
        )
    except FileNotFoundError as error:
        raise UserError(
            f"'{folder}' holds no comparison: it has no {NAME}. Begin one with --model and --data."
        ) from error
    except OSError as error:
        raise files.read_fault(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"'{path}' is damaged ({error!r:.80}). Begin again.") from error
    return pinned


def find_rows(pinned: Pinned) -> None:
    """Have the comparison's own rows where runs read them; cut them again where they are not.

    Raises:
        UserError: what --data and --eval name cannot be read, or holds other rows.
    """
    if not intact(pinned.folder, pinned.parts):
        write_rows(pinned.folder, _same_rows(pinned))


def _same_rows(pinned: Pinned) -> dict[str, Examples]:
    """The rows that --data and --eval name, which must be those that the comparison began with."""
    options = _fit_config({**pinned.given, "task": pinned.settled["task"]})
    where = f"The comparison in '{pinned.folder}' needs the rows that it began with"
    try:
        parts = cut(load_data(options), pinned.config, options.seed)
    except UserError as error:
        raise UserError(f"{where}; name their files as --data and --eval. {error}") from error
    other = [n for n, part in pinned.parts.items() if parts[n].fingerprint != part.fingerprint]
    if other:
        sources = " and ".join(name for name in (options.data, options.eval) if name is not None)
        raise UserError(
            f"{where}, and {sources} give others ({', '.join(other)}). Name its own files as "
            "--data and --eval, or another --out."
        )
    return parts


def _fit_config(given: Mapping[str, Any]) -> FitConfig:
    """The options as those of a fit; the head stands for any method, as it asks for none."""
    return make_config({**given, "method": "head", "out": "-"}, _WHERE)


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of fit with their kinds and limits checked, those alone that were given."""
    wrong = [f"'{name}' is set by the comparison itself." for name in given if name in OF_THE_GRID]
    known = [*SHARED, *CompareConfig.model_fields]
    other = [name for name in given if name not in SHARED and name not in OF_THE_GRID]
    wrong += [f"'{name}' is no option.{nearest(name, known)}" for name in other]
    gather(UserError, _WHERE, wrong)
    whole = _fit_config(given).model_dump(mode="json")
    return {name: whole[name] for name in given}


def _grown(pinned: Pinned, given: Mapping[str, Any], compared: Mapping[str, Any]) -> Pinned:
    """The comparison with what is given, where that may be given."""
    now = _checked({**pinned.given, **given})
    fit = merge(pinned.given, {name: now[name] for name in given}, pinned.folder)
    wanted = make_compare(compared, _WHERE).model_dump(mode="json")
    before = pinned.config.model_dump(mode="json")
    options = merge(before, {name: wanted[name] for name in compared}, pinned.folder)
    grown = replace(pinned, given=fit, config=make_compare(options, _WHERE))
    if fit != pinned.given:
        _same_rows(grown)
    return grown


def _fresh(
    folder: Path, given: Mapping[str, Any], config: CompareConfig, watcher: Reporter
) -> Pinned:
    """Read the rows, cut the tuning rows from the training rows, and write all of them down."""
    options = _fit_config(given)
    device = choose_device(options.device).type
    data = load_data(options)
    for note in data.notes:
        watcher.note(note)
    # one number format for all, or the methods would differ in more than themselves: full
    # fine-tuning trains in float32, whatever the others could do
    dtype = "float32" if options.dtype == "auto" else options.dtype
    metric = main_metric(data.train.task, options.metric)
    parts = write_rows(folder, cut(data, config, options.seed), keep=True)
    held = options.eval or "held out of them"
    about = f"Training rows: {options.data}, {len(data.train):,}. Evaluation rows: {held}, "
    return Pinned(
        folder=folder,
        given=given,
        settled={"task": data.train.task, "metric": metric, "device": device, "dtype": dtype},
        config=config,
        labels=len(data.train.label_names),
        parts=parts,
        notes=(f"{about}{len(data.held):,}.", *data.notes),
    )
