"""What the training room tells whoever watches it work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

__all__ = ["Reporter", "Silent"]


class Reporter(Protocol):
    """Receives what happens, as it happens."""

    def note(self, text: str) -> None:
        """A sentence for the user."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Work of ``total`` steps begins, ``done`` of them done before."""

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        """``done`` steps are done; ``values`` are the figures of the moment, such as the loss."""

    def finish(self) -> None:
        """The work that was started is over."""


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        pass

    def start(self, what: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass
