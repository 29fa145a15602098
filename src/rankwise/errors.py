"""One base error and its few children: what, where, why, how to fix, and the exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "ArtifactError",
    "EnvironmentFault",
    "RankwiseError",
    "UserError",
    "gather",
    "nearest",
]


class RankwiseError(Exception):
    """Anything Rankwise refuses to do.

    The message is one or more plain sentences: what is wrong, where, why it matters and how to
    fix it. The command line prints it without a traceback and leaves with ``exit_code``.
    """

    exit_code = 1


class UserError(RankwiseError, ValueError):
    """The request cannot be carried out as asked: a wrong name, value, file or combination."""

    exit_code = 2


class ArtifactError(RankwiseError):
    """A file Rankwise was given is damaged, incomplete or does not belong to this model."""

    exit_code = 3


class EnvironmentFault(RankwiseError):
    """The machine lacks something: a package, a device, a network, disk space."""

    exit_code = 4


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """A hint naming the candidates closest to ``name``, or an empty string.

    Returns a sentence such as ``" Did you mean 'query'?"`` that can be put after a message.
    """
    unique = list(dict.fromkeys(candidates))
    found = difflib.get_close_matches(name, unique, n=n, cutoff=0.5)
    if not found:
        lowered = {c.lower(): c for c in reversed(unique)}
        found = [
            lowered[c] for c in difflib.get_close_matches(name.lower(), lowered, n=n, cutoff=0.5)
        ]
    if not found:
        return ""
    quoted = [f"'{c}'" for c in found]
    listed = quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]
    return f" Did you mean {listed}?"


def gather(kind: type[RankwiseError], title: str, problems: Sequence[str], limit: int = 20) -> None:
    """Raise one ``kind`` that lists every problem; do nothing when there is none.

    At most ``limit`` problems are written out, and the rest are counted.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise kind(f"{title}: {problems[0]}")
    shown = [f"  - {p}" for p in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  - and {len(problems) - limit} more")
    raise kind(f"{title}:\n" + "\n".join(shown))
