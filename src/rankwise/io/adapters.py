"""save_adapter and load_adapter: one folder for what any method trained, and the way back."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from rankwise.attaching import Attachment, attach, attached, attachment, kept_layers, uncollected
from rankwise.errors import ArtifactError, EnvironmentFault, UserError
from rankwise.io.base import base_of
from rankwise.io.files import missing, read_fault
from rankwise.io.peft import PICKLE, WEIGHTS, read_peft, write_peft
from rankwise.io.peft_config import CONFIG
from rankwise.io.state import CARD, TRAINED, load_trained, save_trained
from rankwise.methods.adapter import Adapter, adapter_of
from rankwise.methods.lora import LoRA

__all__ = ["load_adapter", "save_adapter"]

_OURS = frozenset({CONFIG, WEIGHTS, CARD, TRAINED})


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    adapter: Adapter | None = None,
    base_model_name: str | None = None,
) -> Path:
    """Save what was trained on a model; the inverse of :func:`load_adapter`.

    LoRA becomes PEFT's folder (adapter_config.json, adapter_model.safetensors), which PEFT and
    transformers load. Every other method becomes rankwise.json and trained.safetensors. Base
    weights are not written (Full has none), nothing is fetched, and the folder appears whole or not
    at all.

    An existing folder is replaced when it is empty or holds an adapter and nothing else.

    Args:
        model: the base, with the adapter on it.
        folder: where; parents are made.
        name: of the adapter on the model; None for the only one.
        adapter: one that is not on the model but fits it, on the CPU, such as one that
            :func:`rankwise.methods.combining.combine` has made of several or cut to a lower rank;
            the model is then only looked at.
        base_model_name: what the base is called; for a transformers model it is known.

    Returns the folder.

    Raises:
        UserError: nothing is attached, the adapter is merged or not finite, or the folder holds
            other files.
        EnvironmentFault: the disk refuses.
    """
    if name is not None and adapter is not None:
        raise UserError("Name an adapter of the model, or give one that is not on it; not both.")
    _refuse_foreign(Path(folder))
    if adapter is None:
        if not isinstance(attachment(model, name).method, LoRA):
            return save_trained(model, folder, name=name, base_model_name=base_model_name)
        adapter = adapter_of(model, name)
    return write_peft(adapter, folder, base_of(model, adapter, base_model_name))


@uncollected
def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    allow_nonfinite: bool = False,
    allow_pickle: bool = False,
    mmap: bool = False,
) -> Attachment:
    """Read a folder and attach what it holds to the base it was made on.

    The folder is one of :func:`save_adapter` or of PEFT, or holds one such folder (PEFT makes a
    sub-folder for an adapter with a name). Everything is checked before the model is touched:
    each tensor must have its place, each layer must be filled, and the base must be the right one.

    Args:
        model: the base; it may carry adapters of other names.
        folder: where.
        name: what the adapter is to be called on this model.
        allow_nonfinite: whether NaN and infinity are let pass.
        allow_pickle: whether an adapter_model.bin is opened, for its tensors alone, where there is
            no safetensors file.
        mmap: leave A and B of a LoRA adapter in the pages of the file, as ``torch.load(...,
            mmap=True)`` does, in place of copying them: it loads faster, takes no memory of its own
            on the CPU until a number is written, which leaves the file as it is, and processes
            share the pages. The file must then not be cut or rewritten in place while the model
            lives; :func:`save_adapter` replaces files and never rewrites them. What else was
            trained, other methods' files and .bin files are copied all the same.

    Raises:
        UserError: there is no such folder, or the model carries an adapter of this name already.
        ArtifactError: lists all that is wrong with the files or their fit to this model.
        EnvironmentFault: a file cannot be read.
    """
    if name in attached(model):
        raise UserError(
            f"This model carries an adapter already, and it is named '{name}'. Detach it first "
            "(rankwise.detach), or load this one under another name: rankwise.load_adapter(model, "
            "folder, name='...')."
        )
    if attached(model) and kept_layers(model) is not None:
        raise UserError("The adapter of this model is merged; call rankwise.unmerge(model) first.")
    home = _home(Path(folder))
    if (home / CARD).exists():
        return load_trained(model, home, name=name, allow_nonfinite=allow_nonfinite)
    adapter = read_peft(home, model, allow_nonfinite=allow_nonfinite, allow_pickle=allow_pickle)
    return attach(model, replace(adapter, lent=mmap), name=name)


def _home(folder: Path) -> Path:
    """The folder itself, or the one folder in it, that holds an adapter."""
    if folder.is_file():
        raise UserError(f"'{folder}' is a file; name the folder it is in, '{folder.parent}'.")
    try:
        inside = sorted(folder.iterdir())
    except FileNotFoundError as error:
        hub = "Rankwise reads local folders and fetches nothing: download an adapter of the hub"
        raise UserError(f"{missing(folder)} {hub} first (hf download).") from error
    except OSError as error:
        raise read_fault(folder, error) from error
    if _holds(folder):
        return folder
    homes = [entry for entry in inside if entry.is_dir() and _holds(entry)]
    if len(homes) == 1:
        return homes[0]
    if homes:
        raise UserError(
            f"'{folder}' holds several adapters; name one: {', '.join(str(h) for h in homes)}."
        )
    weights = any((folder / file).exists() for file in (WEIGHTS, PICKLE))
    stray = " Its weights are there without it." if weights else ""
    listed = ", ".join(entry.name for entry in inside[:8]) or "nothing"
    raise ArtifactError(
        f"'{folder}' holds no adapter: there is no {CONFIG} and no {CARD}.{stray} "
        f"It holds: {listed}."
    )


def _holds(folder: Path) -> bool:
    return (folder / CONFIG).exists() or (folder / CARD).exists()


def _refuse_foreign(folder: Path) -> None:
    """Only an empty folder, or one with an adapter and nothing else, may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; name a folder.")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise EnvironmentFault(f"'{folder}' cannot be looked into: {error.strerror}.") from error
    foreign = [name for name in names if name not in _OURS]
    if foreign:
        raise UserError(
            f"'{folder}' holds other files ({', '.join(foreign[:5])}), and saving replaces the "
            "folder as a whole. Name a new folder."
        )
