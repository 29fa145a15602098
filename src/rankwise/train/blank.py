"""The model that a checkpoint's config.json names, without weights: its modules and their kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rankwise.errors import UserError
from rankwise.train.model import import_transformers, load_config, quiet_transformers

__all__ = ["blank_model"]


def blank_model(source: str) -> nn.Module:
    """The model of the architecture that a folder's config.json names, on the meta device.

    Raises:
        UserError: the config names no architecture that transformers knows.
        ArtifactError: the config is damaged.
        EnvironmentFault: transformers is not installed, or the hub cannot be reached.
    """
    transformers = import_transformers()
    config = load_config(source)
    names = list(config.architectures or [])
    kind: Any = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise UserError(
            f"The config.json of '{source}' names {names[0] if names else 'no architecture'}, for "
            "which transformers has no model, so its layers are not known. Save the model again "
            "with save_pretrained."
        )
    with torch.device("meta"), quiet_transformers():
        return kind(config)
