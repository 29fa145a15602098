"""JSON files that nobody vouches for: read up to a limit, and strictly."""

from __future__ import annotations

from pathlib import Path

from rankwise.errors import ArtifactError
from rankwise.io.files import missing, read_fault
from rankwise.io.tensors import strict_json

__all__ = ["read_json"]


def read_json(path: Path, limit: int = 1_000_000) -> dict[str, object]:
    """The JSON object in a file of at most ``limit`` bytes.

    Raises:
        UserError: there is no such file.
        ArtifactError: it is empty, too large, or no JSON object (:func:`strict_json`).
        EnvironmentFault: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise read_fault(path, error) from error
    if not content:
        raise ArtifactError(f"'{path}' is empty (0 bytes). Fetch or save it again.")
    if len(content) > limit:
        raise ArtifactError(f"'{path}' is larger than {limit:,} bytes, which no such file is.")
    return strict_json(content, f"'{path}'", "the file")
