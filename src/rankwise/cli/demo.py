"""`rankwise demo`: LoRA's claims on a real encoder and real text, on this machine, in minutes."""

from __future__ import annotations

from typing import Annotated

import typer

from rankwise.cli.console import make_reporter

__all__ = ["command"]


def command(
    *,
    out: Annotated[str, typer.Option(help="Folder of the demo.", metavar="FOLDER")] = "runs/demo",
) -> None:
    """Adapt all-MiniLM-L6-v2 to tell which part of Python's standard library a docstring is from.

    Head-only, LoRA at several ranks and full fine-tuning, under the same data and epochs; then the
    chosen adapter is merged and certified, and report.html shows it all. A run that was stopped
    goes on where it was.
    """
    from rankwise.lab.demo import Demo, run_demo

    print(run_demo(out, Demo(), make_reporter()))
