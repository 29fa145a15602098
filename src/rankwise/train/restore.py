"""A finished run as a model again: its base, its adapter on it, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import UserError
from rankwise.io.adapters import load_adapter
from rankwise.train.config import FitConfig, make_config
from rankwise.train.manifest import read_manifest
from rankwise.train.model import Base, load_base
from rankwise.train.setup import longest_input

__all__ = ["Restored", "restore"]


@dataclass(frozen=True)
class Restored:
    """A run's model with its adapter attached, in evaluation mode.

    Attributes:
        base: the model, tokenizer and base fingerprint.
        config: the run's options.
        manifest: the run's manifest.
    """

    base: Base
    config: FitConfig
    manifest: dict[str, Any]

    @property
    def max_length(self) -> int:
        return longest_input(self.config, self.base)


def restore(
    run: str | Path,
    *,
    model: str | None = None,
    which: str = "adapter",
    dtype: torch.dtype | None = torch.float32,
) -> Restored:
    """Load the base of a run and put the run's adapter on it.

    Args:
        run: the run folder.
        model: where the base is now, when it has moved.
        which: "adapter" (the best) or "last", which are one where the run kept the last.
        dtype: number format of the base; None keeps the checkpoint's own.

    Raises:
        UserError: the folder is no run, or its training has not saved an adapter yet.
        ArtifactError: the adapter is damaged, or does not belong to this base.
    """
    folder = Path(run)
    manifest = read_manifest(folder)
    config = make_config(manifest["config"], f"The config in {folder / 'manifest.json'}")
    if config.select == "last":
        which = "adapter"
    if not (folder / which).is_dir():
        raise UserError(
            f"The run in '{folder}' has saved no {which} yet (it is {manifest['status']}). Let it "
            f"go on: rankwise fit --resume --out {folder}"
        )
    base = load_base(
        model or config.model,
        manifest["task"],
        manifest["label_names"],
        revision=config.revision,
        dtype=dtype,
    )
    load_adapter(base.model, folder / which)
    base.model.eval()
    return Restored(base, config, manifest)
