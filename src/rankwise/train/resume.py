"""Whether a run that goes on is the same run: its options, its data, its base and its device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import UserError
from rankwise.train.config import FitConfig, make_config
from rankwise.train.manifest import read_manifest

__all__ = ["config_of_run", "refuse_changes", "refuse_other_device"]


def config_of_run(folder: str | Path, given: Mapping[str, Any]) -> FitConfig:
    """The config of the run in a folder; options that were given must say the same.

    Raises:
        UserError: an option differs from the run's.
    """
    # a base's own dropout acted before there was an option
    stored = {"base_dropout": True, **read_manifest(folder)["config"]}
    now = make_config({**stored, **given, "out": str(folder)}, f"The options to resume '{folder}'")
    _refuse(_option_changes(stored, now.model_dump(mode="json")))
    return now


def refuse_other_device(before: Mapping[str, Any], device: torch.device) -> None:
    """A run goes on only on the kind of device that it began on.

    Raises:
        UserError: it is another one; the message says how to name the first.
    """
    kind = before["hardware"].get("device_type", device.type)
    if kind != device.type:
        raise UserError(
            f"The run was begun on {kind}, and would go on on {device.type}, where rounding and "
            f"random numbers are others. Resume it with --device {kind}, on a machine that has it, "
            "or start a new run with another --out."
        )


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A run goes on only with the same options, data and base; both are manifests.

    Raises:
        UserError: lists all that has changed.
    """
    changes = _option_changes(before["config"], now["config"])
    for what in ("train", "eval"):
        if before["data"][what]["fingerprint"] != now["data"][what]["fingerprint"]:
            changes.append(f"the {what} data is not what it was ({now['data'][what]['source']})")
    if before["base"]["fingerprint"] != now["base"]["fingerprint"]:
        changes.append(f"the weights of the base are not what they were ({now['base']['source']})")
    _refuse(changes)


def _option_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A clause for each option that differs.

    The run and its files may move, as the rows are known by their fingerprints; the device is told
    apart. What backward runs again changes no number. An option that is newer than the run is what
    was done before there was one (:func:`config_of_run`).
    """
    may = ("out", "device", "data", "eval", "recompute")
    return [
        f"--{key.replace('_', '-')} was {before[key]!r} and is now {value!r}"
        for key, value in now.items()
        if key in before and before[key] != value and key not in may
    ]


def _refuse(changes: list[str]) -> None:
    if changes:
        raise UserError(
            "The run cannot go on, because it would not be the same run: "
            + "; ".join(changes)
            + ". Put back what changed, or start a new run with another --out."
        )
