"""The certificate of a merge as a report shows it, checked part by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from rankwise.errors import ArtifactError, gather

__all__ = ["Check", "certificate_view"]


@dataclass(frozen=True)
class Check:
    """One line of a merge certificate: what merging moved, what is allowed, what the adapter does.

    A number that the certificate gives as null is NaN here. ``passed`` is the certificate's own
    verdict on the line, True where it gives none.
    """

    name: str
    error: float
    bound: float
    effect: float
    passed: bool

    @property
    def within(self) -> bool:
        """True when the error is a number no larger than the bound, and nothing else failed."""
        return self.passed and self.error <= self.bound


def certificate_view(given: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate as the page shows it, checked part by part.

    Raises:
        ArtifactError: it lacks a part, or holds one of the wrong kind.
    """
    problems: list[str] = []

    def take(source: Mapping[str, Any], key: str, kinds: tuple[type, ...], where: str = "") -> Any:
        value = source.get(key)
        allowed = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if key not in source:
            problems.append(f"'{where}{key}' is missing.")
        elif not allowed:
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            problems.append(f"'{where}{key}' must be {names}, got {value!r:.60}.")
        return value if allowed else None

    def check(row: Any, where: str, name: str | None, allowed: str) -> Check:
        found = cast("Mapping[str, Any]", row) if isinstance(row, Mapping) else {}
        label = take(found, "name", (str,), where) if name is None else name
        numbers = [
            take(found, key, (int, float, type(None)), where)
            for key in ("error", allowed, "effect")
        ]
        error, bound, effect = (math.nan if n is None else float(n) for n in numbers)
        return Check(str(label), error, bound, effect, found.get("passed", True) is True)

    listed = take(given, "layers", (list, tuple)) or []
    layers = [check(row, f"layers[{i}].", None, "bound") for i, row in enumerate(listed)]
    outputs = take(given, "outputs", (Mapping, type(None)))
    output = None if outputs is None else check(outputs, "outputs.", "outputs", "tolerance")
    hashes = take(given, "sha256", (Mapping,)) or {}
    text = (str, type(None))
    view: dict[str, Any] = {
        "passed": take(given, "passed", (bool,)),
        "finite": take(given, "finite", (bool,)),
        "dtype": take(given, "dtype", (str,)),
        "probe": take(given, "probe", (str,)),
        "sha256": {k: take(hashes, k, text, "sha256.") for k in ("base", "adapter", "merged")},
    }
    gather(ArtifactError, "The merge certificate is not complete", problems)
    agrees = view["finite"] and all(c.within for c in [*layers, *([output] if output else [])])
    contradiction = view["passed"] and not agrees
    verdict = "passed" if view["passed"] else "failed"
    return view | {
        "layers": layers,
        "output": output,
        "over": [layer for layer in layers if not layer.within],
        "problems": [str(problem) for problem in given.get("problems", ())],
        "contradiction": contradiction,
        "good": view["passed"] and agrees,
        "verdict": "in doubt" if contradiction else verdict,
    }
