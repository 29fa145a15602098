"""Which format a file or folder is in, told by its names and keys alone."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rankwise.errors import ArtifactError, UserError
from rankwise.io import diffusers, mlx
from rankwise.io.files import missing, read_fault
from rankwise.io.json_files import read_json
from rankwise.io.peft import WEIGHTS
from rankwise.io.peft_config import CONFIG
from rankwise.io.pickles import ENDINGS
from rankwise.io.state import CARD

__all__ = ["FOLDERS", "detect", "home"]

FOLDERS = ("peft", "mlx", "diffusers")  # formats that are a folder; the others are one file
_FILES = (".gguf", ".safetensors", *ENDINGS)
_RUN = ("manifest.json", "adapter")  # what the folder of a run holds


def detect(path: str | os.PathLike[str]) -> tuple[str, Path]:
    """The format's name, and the folder or file of it that ``path`` is or holds.

    A run of ``rankwise fit`` means its adapter. A folder with one folder of an adapter in it, as
    PEFT makes for an adapter with a name, means that one; a folder with one file that an adapter
    may be in means that file.

    Raises:
        UserError: there is nothing, or nothing that is known, or several adapters.
        ArtifactError: a file is damaged.
    """
    place = home(path)
    if place.is_dir():
        return _folder_format(place), place
    if place.suffix == ".gguf":
        return "gguf", place
    if place.suffix in ENDINGS:
        return "loralib", place
    return _keys_format(place), place


def home(path: str | os.PathLike[str]) -> Path:
    """The folder or file with the adapter: the path itself, or the one such in it."""
    place = Path(path)
    if all((place / part).exists() for part in _RUN):
        place = place / _RUN[1]
    if place.is_file():
        if place.suffix not in _FILES:
            raise UserError(
                f"'{place}' is no adapter by its name, which should end in {', '.join(_FILES)}."
            )
        return place
    try:
        inside = sorted(place.iterdir())
    except FileNotFoundError as error:
        raise missing(place) from error
    except OSError as error:
        raise read_fault(place, error) from error
    if _holds(place):
        return place
    if (place / CARD).exists():
        raise UserError(
            f"'{place}' holds what another method than LoRA trained ({CARD}) and no low-rank "
            "update. Name an adapter of LoRA."
        )
    found = [entry for entry in inside if entry.is_dir() and _holds(entry)]
    found = found or [e for e in inside if e.is_file() and e.suffix in _FILES]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"'{place}' holds several adapters; name one: {_listed(found)}.")
    names = ", ".join(entry.name for entry in inside[:8]) or "nothing"
    raise UserError(f"'{place}' holds no adapter of a known format. It holds: {names}.")


def _holds(folder: Path) -> bool:
    return (folder / CONFIG).exists() or (folder / diffusers.WEIGHTS).exists()


def _folder_format(folder: Path) -> str:
    if not (folder / CONFIG).exists():
        return "diffusers"
    raw = read_json(folder / CONFIG)
    weights = (folder / mlx.WEIGHTS).exists() and not (folder / WEIGHTS).exists()
    return "mlx" if weights or ("lora_parameters" in raw and "peft_type" not in raw) else "peft"


def _keys_format(path: Path) -> str:
    """The format of one safetensors file, by how its tensors are called."""
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise ArtifactError(f"'{path}' is not a valid safetensors file: {error}.") from error
    except OSError as error:
        raise read_fault(path, error) from error
    if any(key.endswith((".lora_down.weight", ".lora_up.weight")) for key in keys):
        return "kohya"
    if any(key.endswith((".lora_A", ".lora_B")) for key in keys):
        return "loralib"
    beside = "PEFT" if any(key.startswith("base_model.model.") for key in keys) else None
    if any(key.endswith((".lora_a", ".lora_b")) for key in keys):
        beside = "mlx-lm"
    if beside is not None:
        raise UserError(
            f"'{path}' is a weights file of {beside}, which says nothing without the {CONFIG} "
            "beside it. Name the folder."
        )
    if any(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys):
        return "diffusers"
    raise UserError(
        f"'{path}' holds no low-rank factors under names that are known, such as 'lora_A' or "
        f"'lora_down'. It holds: {', '.join(keys[:5]) or 'nothing'}."
    )


def _listed(entries: list[Path]) -> str:
    return ", ".join(str(entry) for entry in entries[:8])
