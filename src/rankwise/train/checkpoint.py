"""Checkpoints: everything a bit-exact continuation needs, written whole or not at all."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.errors import ArtifactError, RankwiseError
from rankwise.io import files
from rankwise.io.tensors import read_tensors, write_tensors
from rankwise.layers import LowRank

__all__ = ["Progress", "capture_rng", "frozen_state", "load_newest", "restore_rng", "save"]

_TENSORS, _STATE, _SEAL = "tensors.safetensors", "state.json", "complete.json"
_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands, apart from its tensors.

    Attributes:
        step: optimiser steps done; the epoch and the batch follow from it.
        seconds: time spent in training steps so far.
        eval_seconds: time spent in evaluations so far.
        skipped: steps whose loss or gradient was not finite.
        skipped_in_row: how many of them were the last ones.
        micro_batch: rows in one pass; halved when memory ran out.
        best: the best value of the metric so far, and the step it came from.
        best_step: see ``best``.
        best_metrics: all metrics of that evaluation.
        live: names of the parameters that have had a gradient other than zero.
        window: sum of losses and number of losses since the last logged step.
        log_bytes: length of metrics.jsonl, so that a continuation writes on from there.
    """

    micro_batch: int
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_row: int = 0
    best: float | None = None
    best_step: int | None = None
    best_metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    live: tuple[str, ...] = ()
    window: tuple[float, int] = (0.0, 0)
    log_bytes: int = 0
    eval_seconds: float = 0.0


def capture_rng(device: torch.device) -> dict[str, Any]:
    """The state of every random generator that training draws from."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "device": _device_rng(device),
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Put every generator back to what :func:`capture_rng` saw."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["device"])
        elif device.type == "mps":
            torch.mps.set_rng_state(state["device"])


def _device_rng(device: torch.device) -> Tensor | None:
    if device.type == "cuda":
        return torch.cuda.get_rng_state()
    return torch.mps.get_rng_state() if device.type == "mps" else None


def frozen_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What of the updates does not train but was made at the start: a frozen A, A0 and B0.

    It is part of a checkpoint, so that going on does not depend on computing it again.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            held = {"start_A": module.start_A, "start_B": module.start_B}
            if module.spec.freeze_A:
                held["lora_A"] = module.lora_A
            yield from ((f"{name}.{key}", t) for key, t in held.items() if t is not None)


def save(
    folder: Path,
    progress: Progress,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    keep: int,
) -> Path:
    """Write a checkpoint under ``folder`` and drop the oldest beyond ``keep``.

    Checkpoints of later steps go first: they were found damaged, or the run would not be here.

    The tensors and the state are written and synced first, the seal with their sha256 last, all
    in a folder of a temporary name that is then renamed: a reader finds a whole checkpoint or
    none.
    """
    tensors = {f"param/{n}": p.detach() for n, p in parameters.items()}
    for name, parameter in parameters.items():
        held = optimizer.state.get(parameter, {}) if isinstance(parameter, nn.Parameter) else {}
        for key, value in held.items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    rng = capture_rng(device)
    tensors["rng/torch"] = rng.pop("torch")
    on_device = rng.pop("device")
    if on_device is not None:
        tensors["rng/device"] = on_device
    target = folder / f"step-{progress.step:08d}"
    with files.folder(target) as temporary:
        write_tensors(temporary / _TENSORS, tensors, {"format": "pt"})
        state = {"format": _FORMAT, "progress": asdict(progress), "rng": rng}
        files.write_text(temporary / _STATE, json.dumps(state))
        seal = {name: files.sha256_file(temporary / name) for name in (_TENSORS, _STATE)}
        files.write_text(temporary / _SEAL, json.dumps(seal))
    here = _checkpoints(folder)
    later = here[: here.index(target)]
    for old in [*later, *here[len(later) + keep :]]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_newest(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[Progress | None, list[str]]:
    """Continue from the newest valid checkpoint: parameters, optimiser and generators are set.

    Returns the progress, or None when no checkpoint was written yet, and a sentence for each one
    that was passed over.

    Raises:
        ArtifactError: there are checkpoints, and none is valid.
    """
    passed_over: list[str] = []
    for candidate in _checkpoints(folder):
        try:
            tensors, progress, rng = _read(candidate, parameters)
        except RankwiseError as error:
            passed_over.append(
                f"The checkpoint {candidate.name} is damaged and passed over: {error}"
            )
            continue
        _apply(tensors, parameters, optimizer)
        rng["torch"] = tensors["rng/torch"]
        rng["device"] = tensors.get("rng/device")
        restore_rng(rng, device)
        return progress, passed_over
    if passed_over:
        raise ArtifactError(
            f"No checkpoint in '{folder}' is whole, so the run cannot go on; start it anew with "
            "another --out. " + " ".join(passed_over)
        )
    return None, []


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    found = (p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit())
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def _read(
    folder: Path, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Progress, dict[str, Any]]:
    try:
        seal = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        damaged = [n for n in (_TENSORS, _STATE) if files.sha256_file(folder / n) != seal[n]]
    except (OSError, RankwiseError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / _SEAL} cannot be read ({error}).") from error
    if damaged:
        raise ArtifactError(f"{', '.join(damaged)} is not what was written.")
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if state["format"] != _FORMAT:
        raise ArtifactError("it was written by another version of Rankwise.")
    tensors = dict(read_tensors(folder / _TENSORS, allow_nonfinite=True).tensors)
    wanted = {n: tuple(p.shape) for n, p in parameters.items()}
    prefix = "param/"
    found = {n[len(prefix) :]: tuple(t.shape) for n, t in tensors.items() if n.startswith(prefix)}
    if wanted != found:
        raise ArtifactError("it holds other parameters than this run trains.")
    progress = state["progress"]
    progress["live"] = tuple(progress["live"])
    progress["window"] = tuple(progress["window"])
    return tensors, Progress(**progress), state["rng"]


def _apply(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"param/{name}"])
            state = {
                key: tensors[f"{key}/{name}"].to(parameter.device)
                for key in ("exp_avg", "exp_avg_sq", "step")
                if f"{key}/{name}" in tensors
            }
            if state and isinstance(parameter, nn.Parameter):
                optimizer.state[parameter] = state
