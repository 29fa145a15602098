"""What can be known of a base without running it: its config, its names and shapes, its tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankwise.errors import ArtifactError, UserError
from rankwise.io.files import missing, read_fault
from rankwise.io.json_files import read_json
from rankwise.targets import is_transformers

__all__ = ["Blueprint", "blueprint", "blueprint_of"]

CONFIG = "config.json"
MAX_CONFIG = 10_000_000  # bytes; with long lists of labels they reach some hundred thousand


@dataclass(frozen=True)
class Blueprint:
    """A base as its files describe it.

    Attributes:
        where: what it was read from, for messages.
        config: its config.json; empty where there is none.
        shapes: the shape of each tensor, by full name.
        fetch: reads one of these tensors.
    """

    where: str
    config: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    fetch: Callable[[str], Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules that own a weight."""
        return tuple(n.removesuffix(".weight") for n in self.shapes if n.endswith(".weight"))

    def number(self, key: str) -> int:
        """A whole number above 0 from the config, or from its text_config.

        Raises:
            UserError: it is not there.
        """
        inner = self.config.get("text_config")
        places = (self.config, cast("dict[str, object]", inner) if isinstance(inner, dict) else {})
        for place in places:
            value = place.get(key)
            if type(value) is int and value > 0:
                return value
        raise UserError(f"{self.where} says no {key}, and the conversion needs it.")


def blueprint(path: str | os.PathLike[str]) -> Blueprint:
    """Read a config.json, or a folder with one, with safetensors files, or with both.

    Of the safetensors files only the headers are read; tensors are fetched one by one where a
    conversion needs their numbers. Nothing is downloaded and no model code is run.

    Raises:
        UserError: there is no such place, or it holds neither.
        ArtifactError: a file is damaged.
        EnvironmentFault: a file cannot be read.
    """
    place = Path(path)
    if place.is_file():
        return Blueprint(f"'{place}'", read_json(place, MAX_CONFIG), {}, _nothing)
    try:
        names = sorted(entry.name for entry in place.iterdir())
    except FileNotFoundError as error:
        raise missing(place) from error
    except OSError as error:
        raise read_fault(place, error) from error
    config = read_json(place / CONFIG, MAX_CONFIG) if CONFIG in names else {}
    homes = {
        key: (place / name, shape)
        for name in names
        if name.endswith(".safetensors")
        for key, shape in _header(place / name)
    }
    if not config and not homes:
        raise UserError(
            f"'{place}' holds neither a {CONFIG} nor safetensors files, so it says nothing about "
            "a base model. Name the folder of the base model."
        )
    shapes = {key: shape for key, (_, shape) in homes.items()}
    return Blueprint(f"'{place}'", config, shapes, lambda key: _fetched(homes[key][0], key))


def blueprint_of(model: nn.Module) -> Blueprint:
    """The same of a model in memory; it is only looked at."""
    tensors = {k: t.detach() for k, t in model.state_dict().items()}
    own: Any = model.config if is_transformers(model) else None
    config: dict[str, object] = {} if own is None else own.to_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return Blueprint(f"this {type(model).__name__}", config, shapes, lambda key: tensors[key].cpu())


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  the file is no mapping
                yield key, tuple(file.get_slice(key).get_shape())
    except SafetensorError as error:
        raise ArtifactError(f"'{path}' is not a valid safetensors file: {error}.") from error
    except OSError as error:
        raise read_fault(path, error) from error


def _fetched(path: Path, key: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"'{path}' does not give its tensor '{key}': {error}.") from error


def _nothing(key: str) -> Tensor:
    raise UserError(f"The numbers of '{key}' are needed, and only a config of the base was given.")
