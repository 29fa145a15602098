"""What a name or a regular expression means: plain names, ends of names, patterns in time."""

from __future__ import annotations

from collections.abc import Iterable

import regex

from rankwise.errors import UserError

__all__ = ["PATTERN_SECONDS", "first_match", "is_pattern", "layer_index", "matches"]

PATTERN_SECONDS = 2.0
_META = frozenset("\\*+?[](){}|^$")


def is_pattern(text: str) -> bool:
    r"""Whether a target is a regular expression (it holds one of \ * + ? [ ] ( ) { } | ^ $)."""
    return not _META.isdisjoint(text)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means this module name.

    A plain text means the name itself or its end after a dot (``query`` means
    ``encoder.layer.0.attention.self.query``); a text with regular-expression signs must match the
    whole name (``re.fullmatch``).

    Raises:
        UserError: the expression is malformed, or takes over two seconds on one name.
    """
    if not is_pattern(pattern):
        return name == pattern or name.endswith("." + pattern)
    try:
        return regex.fullmatch(pattern, name, timeout=PATTERN_SECONDS) is not None
    except regex.error as error:
        raise UserError(f"The pattern '{pattern}' is not a regular expression: {error}.") from error
    except RecursionError as error:
        raise UserError(
            f"The pattern '{pattern[:60]}...' is nested too deeply. Write a simpler pattern."
        ) from error
    except TimeoutError as error:
        raise UserError(
            f"The pattern '{pattern}' took over {PATTERN_SECONDS:g} s on the name '{name}'; "
            "repeated groups inside repeats do that. Write a simpler pattern."
        ) from error


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first of ``patterns`` that means ``name``, or None."""
    return next((p for p in patterns if matches(p, name)), None)


def layer_index(name: str) -> int | None:
    """The number of the block a module lies in: the first all-digit part of its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
