"""Rankwise: low-rank updates for pre-trained PyTorch models, with the evidence for their rank."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.attaching import Attachment, attach, attachment, base, detach
    from rankwise.errors import ArtifactError, EnvironmentFault, RankwiseError, UserError
    from rankwise.inits import Gaussian, Kaiming
    from rankwise.io.adapters import load_adapter, save_adapter
    from rankwise.lowrank import Factors
    from rankwise.merging import (
        Certificate,
        EffectError,
        MergeError,
        check_effect,
        effects,
        merge,
        merged,
        unmerge,
    )
    from rankwise.methods.adapter import Adapter, adapter_of
    from rankwise.methods.full import Full
    from rankwise.methods.head import HeadOnly
    from rankwise.methods.lora import LoRA

__version__ = "0.1.0"

# Public names by the room that defines them. They are imported at first use, so that
# `rankwise --help` answers without loading torch.
_HOMES = {
    "attaching": ("Attachment", "attach", "attachment", "base", "detach"),
    "errors": ("ArtifactError", "EnvironmentFault", "RankwiseError", "UserError"),
    "inits": ("Gaussian", "Kaiming"),
    "io.adapters": ("load_adapter", "save_adapter"),
    "lowrank": ("Factors",),
    "merging": (
        "Certificate",
        "EffectError",
        "MergeError",
        "check_effect",
        "effects",
        "merge",
        "merged",
        "unmerge",
    ),
    "methods.adapter": ("Adapter", "adapter_of"),
    "methods.full": ("Full",),
    "methods.head": ("HeadOnly",),
    "methods.lora": ("LoRA",),
}
_HOME = {name: room for room, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "ArtifactError",
    "Attachment",
    "Certificate",
    "EffectError",
    "EnvironmentFault",
    "Factors",
    "Full",
    "Gaussian",
    "HeadOnly",
    "Kaiming",
    "LoRA",
    "MergeError",
    "RankwiseError",
    "UserError",
    "adapter_of",
    "attach",
    "attachment",
    "base",
    "check_effect",
    "detach",
    "effects",
    "load_adapter",
    "merge",
    "merged",
    "save_adapter",
    "unmerge",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rankwise' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"rankwise.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
