"""A dataset of the Hugging Face Hub as a table, and how its name is told from a file's."""

from __future__ import annotations

import importlib
import os
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.table import Table, format_of, read_table
from rankwise.errors import EnvironmentFault, UserError

__all__ = ["HubName", "open_table", "parse_hub_name", "read_hub"]

_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.+-]+))?(?:@([\w.\[\]:%+-]+))?")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class HubName:
    """``name[:config][@split]``, such as ``nyu-mll/glue:sst2@validation``; the split is "train"."""

    name: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.name}{config}{f'@{self.split}' if self.split != 'train' else ''}"


def parse_hub_name(path: str | Path) -> HubName | None:
    """The dataset ``path`` names, or None when it can only be a file.

    It is a file when it exists, when its suffix is that of a data file, when it starts with ``.``,
    ``/`` or ``~``, or when it has more than one slash.
    """
    text = str(path)
    if isinstance(path, Path) or Path(text).expanduser().exists() or format_of(text) is not None:
        return None
    if text.startswith((".", "~", "/")):
        return None
    found = _NAME.fullmatch(text)
    return HubName(found[1], found[2], found[3] or "train") if found else None


def open_table(path: str | Path, file_format: str | None = None) -> Table:
    """The table that ``path`` names: a file where there is one, else a dataset of the Hub.

    ``--data`` and ``--eval`` take both: ``reviews.csv``, or ``name[:config][@split]``.

    Raises:
        UserError, ArtifactError: see :func:`rankwise.data.table.read_table`.
        EnvironmentFault: see :func:`read_hub`.
    """
    hub = None if file_format is not None else parse_hub_name(path)
    if hub is None:
        return read_table(path, file_format)
    return read_hub(hub.name, hub.split, hub.config)


def read_hub(
    name: str, split: str, config: str | None = None, revision: str | None = None
) -> Table:
    """Read one split through the package ``datasets``, from its cache or from the Hub.

    Class labels become their names; -1, the Hub's sign for "no label", becomes "-".

    Raises:
        EnvironmentFault: ``datasets`` is not installed, or the Hub cannot be reached.
        UserError: there is no such dataset, configuration or split, or it has no rows.
    """
    spoken = HubName(name, config, split)
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise EnvironmentFault(
            f"'{name}' is no file or folder here, so it is taken for a dataset of the Hugging "
            "Face Hub, and reading that needs the package datasets, which is not installed. Check "
            'the path, or install it with: pip install "rankwise[hub]"'
        ) from error
    _require_network(spoken)
    try:
        data = datasets.load_dataset(name, config, split=split, revision=revision)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"'{spoken}' is no file or folder here, and the Hugging Face Hub has no such dataset, "
            f"configuration or split: {_first_line(error)} The form is name[:config][@split]."
        ) from error
    except OSError as error:
        raise EnvironmentFault(
            f"'{spoken}' is no file or folder here, and the Hugging Face Hub cannot be reached: "
            f"{_first_line(error)} Check the path, or the network and HF_HUB_OFFLINE, or "
            "download the data to a file first."
        ) from error
    rows: list[dict[str, Any]] = [dict(row) for row in data]
    if not rows:
        raise UserError(f"The dataset {spoken} has no rows.")
    for column, feature in data.features.items():
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                label = row[column]
                row[column] = "-" if label is None or label < 0 else feature.names[label]
    return Table(str(spoken), tuple(data.column_names), rows, list(range(1, len(rows) + 1)))


def _require_network(spoken: HubName) -> None:
    """Fail at once, rather than after half a minute of retries, where the Hub has no address."""
    offline = any(os.environ.get(n, "").lower() in ("1", "on", "true", "yes") for n in _OFFLINE)
    if offline or {"https", "all"} & set(urllib.request.getproxies()):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    host = urllib.parse.urlsplit(endpoint).hostname or endpoint
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise EnvironmentFault(
            f"'{spoken}' is no file or folder here, and the Hugging Face Hub cannot be reached: "
            f"{host} has no address from here, so there is no network. Check the path; or set "
            "HF_HUB_OFFLINE=1 to read a dataset that was downloaded before."
        ) from error


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0].rstrip(". ")
    return f"{line or type(error).__name__}."
