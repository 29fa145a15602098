"""The command line: parse, call one function, print."""

from rankwise.cli.app import main

__all__ = ["main"]
