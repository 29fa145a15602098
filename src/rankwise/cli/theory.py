"""`rankwise theory`: what rank and scaling do, where everything can be computed, in a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.console import make_reporter
from rankwise.cli.options import given

__all__ = ["command"]


def command(
    *,
    out: Annotated[
        str, typer.Option(help="Folder of the records and the page.", metavar="FOLDER")
    ] = "runs/theory",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of training at each rank; 800 when not given.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of every random number; 0 when not given.")
    ] = None,
) -> None:
    """Train updates of every rank on a linear layer, beside the bounds that hold there.

    A and B learn a teacher's weight by gradients. The error at each rank is set beside the least
    that any update of that rank can have, for white inputs, for inputs that are not alike in all
    directions, and for few samples; and three scalings are tried over ranks and learning rates.
    report.html shows it all. A run that was stopped goes on where it was.

    Example: rankwise theory --out runs/theory
    """
    from rankwise.lab.theory import REPORT, Theory, run_theory, summary

    record = run_theory(out, Theory(**given({"steps": steps, "seed": seed})), make_reporter())
    print(summary(record))
    print(f"\nreport: {Path(out) / REPORT}")
