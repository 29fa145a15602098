"""Rankwise: low-rank updates for pre-trained PyTorch models, with the evidence for their rank."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.attaching import (
        Attachment,
        attach,
        attachment,
        attachments,
        base,
        detach,
        set_active,
        set_trainable,
        using,
        using_rows,
    )
    from rankwise.errors import ArtifactError, EnvironmentFault, RankwiseError, UserError
    from rankwise.inits import (
        EVA,
        Gaussian,
        Kaiming,
        LoftQ,
        LoRAGA,
        OLoRA,
        Orthogonal,
        PiSSA,
    )
    from rankwise.io.adapters import load_adapter, save_adapter
    from rankwise.layers import (
        Activation,
        Packing,
        Recomputation,
        Split,
        keep_activations,
        optimize_frozen,
        recompute_activations,
        restore_frozen,
    )
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
    from rankwise.methods.bitfit import BitFit
    from rankwise.methods.bottleneck import After, Bottleneck, Houlsby, Pfeiffer
    from rankwise.methods.combining import (
        DARE,
        SVD,
        TIES,
        Combined,
        Concatenate,
        Magnitude,
        Majority,
        combine,
    )
    from rankwise.methods.full import Full
    from rankwise.methods.groups import parameter_groups
    from rankwise.methods.head import HeadOnly
    from rankwise.methods.hotswap import hotswap
    from rankwise.methods.lora import LoRA
    from rankwise.methods.prefix import PrefixTuning
    from rankwise.methods.trimming import trim
    from rankwise.spectrum import Budget, Energy, MaxError, Spectrum, Top
    from rankwise.train.exported import (
        ExportError,
        ExportReport,
        Onnx,
        TorchExport,
        export_model,
    )
    from rankwise.train.extracting import extract

__version__ = "0.1.0"

# Public names by the room that defines them. They are imported at first use, so that
# `rankwise --help` answers without loading torch.
_HOMES = {
    "attaching": (
        "Attachment",
        "attach",
        "attachment",
        "attachments",
        "base",
        "detach",
        "set_active",
        "set_trainable",
        "using",
        "using_rows",
    ),
    "errors": ("ArtifactError", "EnvironmentFault", "RankwiseError", "UserError"),
    "inits": (
        "EVA",
        "Gaussian",
        "Kaiming",
        "LoRAGA",
        "LoftQ",
        "OLoRA",
        "Orthogonal",
        "PiSSA",
    ),
    "io.adapters": ("load_adapter", "save_adapter"),
    "layers": (
        "Activation",
        "Packing",
        "Recomputation",
        "Split",
        "keep_activations",
        "optimize_frozen",
        "recompute_activations",
        "restore_frozen",
    ),
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
    "methods.bitfit": ("BitFit",),
    "methods.bottleneck": ("After", "Bottleneck", "Houlsby", "Pfeiffer"),
    "methods.combining": (
        "DARE",
        "SVD",
        "TIES",
        "Combined",
        "Concatenate",
        "Magnitude",
        "Majority",
        "combine",
    ),
    "methods.full": ("Full",),
    "methods.groups": ("parameter_groups",),
    "methods.head": ("HeadOnly",),
    "methods.hotswap": ("hotswap",),
    "methods.lora": ("LoRA",),
    "methods.prefix": ("PrefixTuning",),
    "methods.trimming": ("trim",),
    "spectrum": ("Budget", "Energy", "MaxError", "Spectrum", "Top"),
    "train.exported": (
        "ExportError",
        "ExportReport",
        "Onnx",
        "TorchExport",
        "export_model",
    ),
    "train.extracting": ("extract",),
}
_HOME = {name: room for room, names in _HOMES.items() for name in names}

__all__ = [
    "DARE",
    "EVA",
    "SVD",
    "TIES",
    "Activation",
    "Adapter",
    "After",
    "ArtifactError",
    "Attachment",
    "BitFit",
    "Bottleneck",
    "Budget",
    "Certificate",
    "Combined",
    "Concatenate",
    "EffectError",
    "Energy",
    "EnvironmentFault",
    "ExportError",
    "ExportReport",
    "Factors",
    "Full",
    "Gaussian",
    "HeadOnly",
    "Houlsby",
    "Kaiming",
    "LoRA",
    "LoRAGA",
    "LoftQ",
    "Magnitude",
    "Majority",
    "MaxError",
    "MergeError",
    "OLoRA",
    "Onnx",
    "Orthogonal",
    "Packing",
    "Pfeiffer",
    "PiSSA",
    "PrefixTuning",
    "RankwiseError",
    "Recomputation",
    "Spectrum",
    "Split",
    "Top",
    "TorchExport",
    "UserError",
    "adapter_of",
    "attach",
    "attachment",
    "attachments",
    "base",
    "check_effect",
    "combine",
    "detach",
    "effects",
    "export_model",
    "extract",
    "hotswap",
    "keep_activations",
    "load_adapter",
    "merge",
    "merged",
    "optimize_frozen",
    "parameter_groups",
    "recompute_activations",
    "restore_frozen",
    "save_adapter",
    "set_active",
    "set_trainable",
    "trim",
    "unmerge",
    "using",
    "using_rows",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rankwise' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"rankwise.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
