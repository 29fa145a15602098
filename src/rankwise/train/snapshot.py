"""The files of a model on this machine: a local folder, or those of a hub model, fetched once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rankwise.errors import EnvironmentFault
from rankwise.train.manifest import NAME, read_manifest
from rankwise.train.model import import_transformers, is_local

__all__ = ["base_of_run", "local_folder"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def local_folder(source: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """The folder with a model's config and its weights as safetensors.

    A name on a hub is looked for in the cache of transformers, and fetched into it where it is not
    there; without ``fetch`` the cache is all there is.

    Raises:
        EnvironmentFault: transformers is not installed, or the model cannot be had.
    """
    if is_local(source):
        return Path(source)
    import_transformers()
    from transformers.utils import hub

    file: Any = hub.cached_file
    told = {"revision": revision, "local_files_only": not fetch}
    try:
        config = Path(file(source, "config.json", **told))
        index = file(source, _INDEX, **told, _raise_exceptions_for_missing_entries=False)
        names = [_WEIGHTS]
        if index is not None:
            names = sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))
        for name in names:
            file(source, name, **told)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(
            f"The model '{source}' is no local folder and could not be had from the hub: {first} "
            "Check the name and the network, or name a local folder."
        ) from error
    return config.parent


def base_of_run(run: str | os.PathLike[str]) -> tuple[str, Path | None] | None:
    """What a run calls its base, and its folder where it is on this machine; None for no run.

    Raises:
        ArtifactError: the run's manifest is damaged.
    """
    if not (Path(run) / NAME).is_file():
        return None
    config = read_manifest(Path(run))["config"]
    source, revision = str(config["model"]), config.get("revision")
    if is_local(source):
        return source, Path(source) if Path(source).is_dir() else None
    try:
        return source, local_folder(source, revision, fetch=False)
    except EnvironmentFault:
        return source, None
