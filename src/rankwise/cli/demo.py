"""`rankwise demo`: LoRA's claims on a real encoder and real text, on this machine, in minutes."""

from __future__ import annotations

from typing import Annotated

import typer

from rankwise.cli.console import make_reporter
from rankwise.cli.options import given

__all__ = ["command"]


def command(
    *,
    out: Annotated[str, typer.Option(help="Folder of the demo.", metavar="FOLDER")] = "runs/demo",
    train_rows: Annotated[
        int | None, typer.Option(min=16, help="Docstrings to learn from; 960 when not given.")
    ] = None,
    heldout_rows: Annotated[
        int | None, typer.Option(min=16, help="Docstrings to measure on; 480 when not given.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Passes over them; 3 when not given.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the split and of training; 0.")
    ] = None,
) -> None:
    """Try LoRA on a real encoder and real text, on this machine, in minutes.

    all-MiniLM-L6-v2 learns to tell which part of Python's standard library a docstring is from:
    the head alone, LoRA at several ranks, and full fine-tuning, under the same data and epochs.
    Then the chosen adapter is merged and certified, and report.html shows it all. A run that was
    stopped goes on where it was.
    """
    from rankwise.lab.demo import Demo, run_demo

    sizes = {"train_rows": train_rows, "heldout_rows": heldout_rows, "epochs": epochs, "seed": seed}
    demo = Demo(**given(sizes))
    print(run_demo(out, demo, make_reporter()))
