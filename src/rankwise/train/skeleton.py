"""A transformers model of some task, made from its config alone: without weights, or random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.errors import ArtifactError, UserError, nearest
from rankwise.train.model import (
    AUTO_CLASSES,
    import_transformers,
    in_line,
    is_config_fault,
    load_config,
    quiet_transformers,
    read_settings,
)

__all__ = ["make_skeleton", "task_of"]


def make_skeleton(
    source: str,
    task: str = "auto",
    labels: int = 2,
    revision: str | None = None,
    device: str = "meta",
) -> tuple[nn.Module, str]:
    """The model without its weights, and its task.

    Args:
        source: a folder with a config.json, the file itself under any name, or a name on a hub.
        task: classification, regression or causal-lm; "auto" means what the architecture named in
            the config does, or classification.
        labels: classes of a classification head.
        revision: branch, tag or commit of a hub model.
        device: "meta" for tensors without numbers; on any other the weights are random.

    Raises:
        UserError: there is no such folder or file, transformers does not know the architecture, or
            the architecture has no such task.
        ArtifactError: the config is damaged.
        EnvironmentFault: transformers is not installed, or the hub cannot be reached.
    """
    transformers = import_transformers()
    file = Path(source)
    settings = _from_file(file) if file.is_file() else load_config(source, revision)
    known = task_of(settings) if task == "auto" else task
    if known == "classification":
        settings.num_labels = labels
    elif known == "regression":
        settings.num_labels = 1
    try:
        with torch.device(device), quiet_transformers():
            return getattr(transformers, AUTO_CLASSES[known]).from_config(settings), known
    except ValueError as error:
        first = str(error).strip().splitlines()[0].partition(" Model type should be")[0]
        raise UserError(f"'{source}' cannot be had for the task {known}: {first}") from error


def task_of(settings: Any) -> str:
    """The task that a model's config names by its architecture, or classification."""
    names = settings.architectures or []
    return "causal-lm" if any("LMHead" in n or "CausalLM" in n for n in names) else "classification"


def _from_file(file: Path) -> Any:
    """The transformers config in a JSON file."""
    transformers = import_transformers()
    raw = read_settings(file)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise UserError(
            f"'{file}' is no config of a transformers model: it has no model_type. Give the "
            "config.json of a model, or the folder it lies in."
        )
    if raw.get("auto_map"):
        raise UserError(
            f"'{file}' asks to run code that comes with the model (auto_map). Rankwise never does. "
            "Use a model whose architecture transformers itself knows."
        )
    kinds = transformers.CONFIG_MAPPING
    if kind not in kinds:
        raise UserError(
            f"'{file}': transformers {transformers.__version__} knows no model_type '{kind}'."
            f"{nearest(kind, kinds.keys())}"
        )
    try:
        with quiet_transformers():
            return kinds[kind].from_dict(raw)
    except Exception as error:
        if not is_config_fault(error) and not isinstance(error, TypeError | ValueError):
            raise
        raise ArtifactError(f"'{file}' is damaged: {in_line(error)}") from error
