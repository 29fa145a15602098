"""Flags made from the fields of the config, so that an option is written once."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection
from typing import Annotated, Any, cast

import typer
from pydantic import BaseModel

from rankwise.train.config import FitConfig

__all__ = ["given", "with_options"]

_NUMBERS = {int: "N", float: "X"}


def with_options(
    *,
    groups: Collection[str] | None = None,
    names: Collection[str] = (),
    config: type[BaseModel] = FitConfig,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of a config's fields; it receives them as keywords.

    Args:
        groups: take every field of these groups; all when None.
        names: further fields to take.
        config: whose fields they are; each has a description and, in its schema, a group.

    A flag that was not given arrives as None, so that a YAML file or a default can fill it. A
    parameter of the command's own stands in the place of the field of its name.
    """
    fields = {
        name: field
        for name, field in config.model_fields.items()
        if groups is None or _group(field) in groups or name in names
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        made = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(name, field)
            )
            for name, field in fields.items()
            if name not in own
        ]
        kept = [p for p in own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*kept, *made])
        command.__annotations__ = {p.name: p.annotation for p in (*kept, *made)}
        return command

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def _group(field: Any) -> str:
    return str(field.json_schema_extra["group"])


def _flag(name: str, field: Any) -> Any:
    kind, metavar = _kind(field.annotation)
    flag = "--" + name.replace("_", "-")
    flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    default = None if field.is_required() or field.default in (None, [], {}) else field.default
    shown = "" if default is None else f" [default: {_text(default)}]"
    option = typer.Option(
        *flags,
        help=f"{field.description}{shown}".replace("[", "\\["),
        metavar=metavar,
        show_default=False,
        rich_help_panel=_group(field),
    )
    return Annotated[kind | None, option]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(map(_text, cast("list[Any]", value)))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(annotation: Any) -> tuple[type, str | None]:
    """The type that a flag reads, and what its help shows as the value.

    Numbers are read as text: the config checks them, together with all else, in its own words.
    """
    options = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _kind(options[0])
    if origin is Annotated:
        return _kind(options[0])
    if origin is typing.Literal:
        return str, "|".join(map(str, options))
    if origin is list:
        return str, "NUMBERS" if options == [int] else "NAMES"
    if origin is dict:
        return str, "NAME=NUMBER"
    return (bool, None) if annotation is bool else (str, _NUMBERS.get(annotation, "TEXT"))
