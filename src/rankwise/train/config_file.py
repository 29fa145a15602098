"""The options of a run as a YAML file: read, and written with every value in force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rankwise.errors import UserError, nearest
from rankwise.train.config import FitConfig

__all__ = ["dump_config", "read_config"]


def read_config(path: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UserError: the file is missing, is no YAML, or holds no mapping of names.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        found = [str(p) for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise UserError(f"There is no config file '{path}'.{nearest(path, found)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file '{path}' cannot be read: {error}.") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{line} is not YAML: {getattr(error, 'problem', error)}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'key: value' lines, not a {type(values).__name__}.")
    return {str(k): v for k, v in values.items()}


def dump_config(config: FitConfig) -> str:
    """The config as YAML with every value in force, in the order of the groups."""
    values = config.model_dump(mode="json")
    lines: list[str] = []
    group = None
    for name, field in FitConfig.model_fields.items():
        extra = field.json_schema_extra
        now = extra["group"] if isinstance(extra, dict) else None
        if now != group:
            group = now
            lines.append(f"# {group}")
        value = values[name]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        lines.append(yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True).strip())
    return "\n".join(lines) + "\n"
