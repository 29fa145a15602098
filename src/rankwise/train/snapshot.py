"""The files of a model on this machine: a local folder, or those of a hub model, fetched once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankwise.errors import EnvironmentFault
from rankwise.train.model import import_transformers, is_local

__all__ = ["local_folder"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder with a model's config and its weights as safetensors.

    A name on a hub is looked for in the cache of transformers, and fetched into it where it is not
    there.

    Raises:
        EnvironmentFault: transformers is not installed, or the model cannot be had.
    """
    if is_local(source):
        return Path(source)
    import_transformers()
    from transformers.utils import hub

    fetch: Any = hub.cached_file
    try:
        config = Path(fetch(source, "config.json", revision=revision))
        optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        index = fetch(source, _INDEX, **optional)
        names = [_WEIGHTS]
        if index is not None:
            names = sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))
        for name in names:
            fetch(source, name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(
            f"The model '{source}' is no local folder and could not be had from the hub: {first} "
            "Check the name and the network, or name a local folder."
        ) from error
    return config.parent
