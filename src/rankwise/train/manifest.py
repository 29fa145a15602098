"""The birth certificate of a run: config, seed, code, data, base, versions, hardware, result."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankwise
from rankwise.attaching import low_rank_updates, trained_copies, updates_of
from rankwise.data.examples import Examples
from rankwise.errors import ArtifactError, UserError
from rankwise.io.files import write_json
from rankwise.layers import LowRank
from rankwise.lowrank import count
from rankwise.train.config import FitConfig

__all__ = [
    "by_formula",
    "counts",
    "describe_data",
    "method_record",
    "read_manifest",
    "surroundings",
    "write",
]

NAME = "manifest.json"


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of a run in one step; a number that is not finite becomes null."""
    write_json(folder / NAME, _finite(manifest))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        UserError: the folder is no run folder.
        ArtifactError: the manifest is damaged.
    """
    file = Path(folder) / NAME
    if not Path(folder).is_dir():
        raise UserError(f"There is no run folder '{folder}'.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"'{folder}' is no run folder: it has no {NAME}. A run folder is what "
            "`rankwise fit --out FOLDER` writes."
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is damaged: {error}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise ArtifactError(f"{file} is not a manifest that this version of Rankwise reads.")
    return manifest


def method_record(config: FitConfig) -> tuple[str, dict[str, Any]]:
    """A short name of the method, and its options as recorded."""
    if config.method != "lora":
        return _other_record(config)
    alpha = config.alpha if config.alpha is not None else 2.0 * config.r
    options = {
        "method": "lora",
        "r": config.r,
        "alpha": alpha,
        "target_modules": config.target_modules,
        "rank_stabilized": config.rank_stabilized,
        "dropout": config.dropout,
        "init": config.init,
        "dora": config.dora,
        "freeze_A": config.freeze_a,
        "bias": config.bias,
        "lora_plus": config.lora_plus,
        "tied": config.tied,
        "train_nested": config.train_nested,
    }
    return f"{'DoRA' if config.dora else 'LoRA'} r={config.r}{_variant(config)}", options


def _other_record(config: FitConfig) -> tuple[str, dict[str, Any]]:
    """The same for the methods that are not LoRA."""
    where = (config.adapter_placement or "houlsby").capitalize()
    where = where if config.target_modules is None else "named layers"
    size, length = config.adapter_size, config.prefix_length
    names = {
        "head": "head-only",
        "full": "full fine-tuning",
        "bitfit": "BitFit",
        "bottleneck": f"bottleneck m={size}, {where}",
        "prefix": f"prefix L={length}",
    }
    options: dict[str, dict[str, Any]] = {
        "bottleneck": {
            "size": size,
            "placement": config.adapter_placement,
            "target_modules": config.target_modules,
        },
        "prefix": {"length": length},
    }
    return names[config.method], {"method": config.method, **options.get(config.method, {})}


def _variant(config: FitConfig) -> str:
    """What sets a run's method apart from plain LoRA, for its name."""
    alpha = 2.0 * config.r if config.alpha is None else config.alpha
    rule = "" if alpha == 2 * config.r else f" α={alpha:g}"
    said = {
        "all-linear": config.target_modules == ["all-linear"],
        config.init: config.init != "kaiming",
        "A frozen": config.freeze_a,
        "rank-stabilised": config.rank_stabilized,
        f"{config.bias} biases": config.bias != "none",
        f"B {config.lora_plus:g} times as fast": config.lora_plus != 1,
        "tied": config.tied,
        "nested": config.train_nested,
    }
    return rule + "".join(f", {words}" for words, true in said.items() if true)


def counts(model: nn.Module) -> dict[str, int | None]:
    """Parameters of the base and of what trains; those of the updates by formula and by count.

    The base counts the model without its updates, the head included.
    """
    updates = updates_of(model).values()
    adapter = sum(p.numel() for update in updates for p in update.trained())
    beside = sum(p.numel() for update in updates for p in update.parameters())
    formula = sum(map(by_formula, low_rank_updates(model).values()))
    rest = sum(p.numel() for u in updates if not isinstance(u, LowRank) for p in u.trained())
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for m in trained_copies(model).values() for p in m.parameters())
    return {
        "base": total - beside,
        "adapter": adapter,
        "adapter_formula": formula + rest if adapter else None,
        "head": head,
        "trainable": trainable,
    }


def by_formula(update: LowRank) -> int:
    """r (in + out), r · out where A is frozen, and out more for DoRA; times E for a bank."""
    out_features, in_features = update.layout.out_features, update.layout.in_features
    trained = count(out_features, in_features, update.spec.r)
    trained -= update.spec.r * in_features if update.spec.freeze_A else 0
    trained += out_features if update.spec.dora else 0
    return trained * (update.layout.experts or 1)


def describe_data(examples: Examples) -> dict[str, Any]:
    """Source, size and fingerprint of a set of examples."""
    return {
        "source": examples.source,
        "rows": len(examples),
        "fingerprint": examples.fingerprint,
    }


def surroundings(
    device: torch.device, dtype: str, reason: str, kernels: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The code, library versions and hardware of this process, and the kernels that were chosen."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "code": {"version": rankwise.__version__, "commit": _commit()},
        "versions": versions,
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "device_type": device.type,
            "dtype": dtype,
            "dtype_reason": reason,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            **(kernels or {}),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def _commit() -> str | None:
    """The commit of Rankwise's own source tree, with + when it has changes; None when installed."""
    here = Path(rankwise.__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in (here.parent, here.parent.parent)):
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
