"""A base with its weights and nothing on it, for an adapter that its files alone do not tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.errors import UserError
from rankwise.io.peft_alone_keys import ModelNeeded
from rankwise.train.config import make_config
from rankwise.train.manifest import NAME, read_manifest
from rankwise.train.model import load_base, load_config
from rankwise.train.skeleton import task_of

__all__ = ["bare_base"]


def bare_base(
    adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None, needed: ModelNeeded
) -> nn.Module:
    """The model that an adapter was made on, in its checkpoint's own number format.

    A run knows its model, task and classes; ``base`` says where the model is now. For any other
    adapter ``base`` must be a language model, for what head another model had is not known.

    Raises:
        UserError: the model cannot be told so; with what ``needed`` says it is needed for.
        ArtifactError, EnvironmentFault: as of loading a model.
    """
    folder = Path(adapter)
    task, labels, options = "causal-lm", (), dict[str, Any]()
    if (folder / NAME).is_file():
        manifest = read_manifest(folder)
        config = make_config(manifest["config"], f"The config in {folder / NAME}")
        task, labels = manifest["task"], manifest["label_names"]
        options = {} if base is not None else {"revision": config.revision}
        base = base or config.model
    elif base is None:
        raise UserError(f"{needed} Or name its base, a language model, here: --base MODEL.")
    elif task_of(load_config(str(base))) != task:
        raise UserError(
            f"{needed} The base '{base}' is no language model, so its head is not known."
        )
    return load_base(str(base), task, labels, dtype=None, **options).model
