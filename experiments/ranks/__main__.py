"""The ranks of an experiment: each trained apart, cut from a nested run, and advised, side by side.

    python -m experiments.ranks experiments/pydocs-minilm

Takes the LoRA runs of a comparison, those with α in proportion to r, from the experiment's folder
`results/`. Beside them, below `ranks/` (`ranks-WHAT/` for `--results results-WHAT`), it trains for
each seed one nested run of the largest rank, the probe of `rankwise advise`, and the run that it
advises; what is cut from the first two answers the evaluation rows. What is there is not done
again, and what was stopped goes on. The tables are printed, and written to `table.md` there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.ranks.study import RESULTS, Study, advised, nested, read_study
from experiments.ranks.tables import tables

from rankwise.cli.console import fail, make_reporter
from rankwise.errors import RankwiseError, UserError
from rankwise.io import files
from rankwise.lab.settings import Setting
from rankwise.train.folder import claim
from rankwise.train.reporter import Reporter
from rankwise.train.signals import Interrupted

TABLE = "table.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", type=Path, help="folder that has the comparison")
    parser.add_argument("--results", default=RESULTS, help="the comparison's folder in it")
    parser.add_argument("--data", help="training rows, where the comparison cannot find its own")
    parser.add_argument("--eval", help="evaluation rows, likewise")
    parser.add_argument(
        "--beside", type=int, metavar="R", help="compare with this rank, not with the best"
    )
    given = parser.parse_args(arguments)
    rows = {k: v for k in ("data", "eval") if (v := getattr(given, k)) is not None}
    watcher = make_reporter()
    try:
        study = read_study(given.experiment, rows, watcher, given.results)
        sys.stdout.write(run(study, watcher, given.beside))
    except RankwiseError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except Interrupted as stopped:
        sys.stderr.write("\nStopped on request. Go on with: the same command\n")
        sys.exit(128 + stopped.number)


def run(study: Study, reporter: Reporter, beside: int | None = None) -> str:
    """Train and measure what is missing; returns the tables, written where beside the best rank.

    Raises:
        UserError: the rows are needed and not there, or nothing was trained at the rank
            ``beside``.
        Interrupted: a signal asked to stop; the same call goes on.
    """
    if beside is not None and beside not in study.apart:
        raise UserError(f"--beside must be one of {[*study.apart]}, got {beside}.")
    with claim(study.out):
        cuts = [nested(study, seed, reporter) for seed in study.largest]
        advice = [advised(study, seed, reporter) for seed in study.largest]
    first = {k: Setting(f"nested to {k}", tuple(c[k] for c in cuts)) for k in study.apart}
    probes, fits = (tuple(runs) for runs in zip(*advice, strict=True))
    after = [Setting("advised and cut", probes), Setting("advised and trained", fits)]
    text = "\n".join(tables(study, first, after, beside)) + "\n"
    if beside is None:
        files.write_text(study.out / TABLE, text)
    return text


if __name__ == "__main__":
    main()
