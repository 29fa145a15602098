"""save_adapter and load_adapter: one folder for what any method trained, and the way back."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from rankwise.attaching import Attachment, attach, attached, attachment
from rankwise.errors import ArtifactError, EnvironmentFault, UserError
from rankwise.io.base import base_of
from rankwise.io.files import missing, read_fault
from rankwise.io.peft import WEIGHTS, read_peft, write_peft
from rankwise.io.peft_config import CONFIG
from rankwise.io.state import CARD, TRAINED, load_trained, save_trained
from rankwise.methods.adapter import adapter_of
from rankwise.methods.lora import LoRA

__all__ = ["load_adapter", "save_adapter"]

_OURS = frozenset({CONFIG, WEIGHTS, CARD, TRAINED})


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model_name: str | None = None
) -> Path:
    """Save what was trained on a model; the inverse of :func:`load_adapter`.

    LoRA becomes PEFT's folder (adapter_config.json, adapter_model.safetensors), which PEFT and
    transformers load. HeadOnly and Full become rankwise.json and trained.safetensors. Base weights
    are not written (Full has none), nothing is fetched, and the folder appears whole or not at all.

    An existing folder is replaced when it is empty or holds an adapter and nothing else.
    ``base_model_name`` is what the base is called; for a transformers model it is known.

    Returns the folder.

    Raises:
        UserError: nothing is attached, the adapter is merged or not finite, or the folder holds
            other files.
        EnvironmentFault: the disk refuses.
    """
    record = attachment(model)
    _refuse_foreign(Path(folder))
    if not isinstance(record.method, LoRA):
        return save_trained(model, folder, base_model_name=base_model_name)
    adapter = adapter_of(model)
    base = base_of(model, adapter.factors, adapter.modules, base_model_name)
    return write_peft(adapter, folder, base)


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, allow_nonfinite: bool = False
) -> Attachment:
    """Read a folder and attach what it holds to the base it was made on.

    The folder is one of :func:`save_adapter` or of PEFT, or holds one such folder (PEFT makes a
    sub-folder for an adapter with a name). Everything is checked before the model is touched:
    each tensor must have its place, each layer must be filled, and the base must be the right one.

    Raises:
        UserError: there is no such folder, or the model carries an adapter already.
        ArtifactError: lists all that is wrong with the files or their fit to this model; NaN and
            infinity are wrong unless ``allow_nonfinite``.
        EnvironmentFault: a file cannot be read.
    """
    if attached(model) is not None:
        raise UserError(
            "This model carries an adapter already. Detach it first: rankwise.detach(model)."
        )
    home = _home(Path(folder))
    if (home / CARD).exists():
        return load_trained(model, home, allow_nonfinite=allow_nonfinite)
    return attach(model, read_peft(home, model, allow_nonfinite=allow_nonfinite))


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
    stray = " Its weights are there without it." if (folder / WEIGHTS).exists() else ""
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
