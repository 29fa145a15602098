"""`rankwise advise`: which rank a task needs, by a probe and what can be cut from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.console import make_reporter, table
from rankwise.cli.options import given, with_options

if TYPE_CHECKING:
    from rankwise.lab.advising import Advice

__all__ = ["command"]

_LORA = (
    *("alpha", "target_modules", "exclude_modules", "layers", "dropout", "init", "bias", "head"),
    *("modules_to_save", "out", "metric", "eval_batch_size", "save_minutes", "keep_checkpoints"),
)


@with_options(groups=("Model", "Data", "Training"), names=_LORA)
def command(
    *,
    r: Annotated[
        int | None,
        typer.Option(
            min=2, help="Rank of the probe; when not given 8, and twice that while more is needed."
        ),
    ] = None,
    eval_fraction: Annotated[
        str | None,
        typer.Option(
            help="Share of the training rows that cuts are tried on, 0.2 when not given.",
            rich_help_panel="Data",
            metavar="X",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="YAML file with the options of fit; flags win over it.", metavar="FILE"),
    ] = None,
    **options: Any,
) -> None:
    """Find the smallest rank that is as good as a generous one, and a config for it.

    A probe is trained on a part of the training rows. Its singular values say what can be cut; the
    cuts are tried on the rest of the training rows, once with one rank for all layers and once with
    ranks chosen layer by layer. The smallest that is as good as the probe, by a paired bootstrap
    over the rows, is advised. Where half of the probe's ranks are not enough, one of twice its rank
    is trained, and takes its place if it is better. Rows of --eval choose nothing.

    Example: rankwise advise --model bert-base-uncased --data train.tsv --out runs/advice
    """
    from rankwise.errors import UserError
    from rankwise.lab.advising import CONFIG, REPORT, TRIMMED, Advise, advise, without_rank
    from rankwise.train.config_file import read_config

    values = {} if config is None else read_config(config)
    if r is None:
        values = without_rank(values)  # the rank of the file is what is looked for
    values |= given({**options, "eval_fraction": eval_fraction, "r": r})
    if "out" not in values:
        raise UserError("Name the folder of the advice: --out FOLDER")
    wanted = Advise(values)
    advice = advise(wanted, make_reporter())
    print(_table(advice))
    print()
    print((wanted.out / CONFIG).read_text(encoding="utf-8"))
    print(f"config:  {wanted.out / CONFIG}")
    if advice.chosen is not None:
        print(f"adapter: {wanted.out / TRIMMED} (the probe, cut to these ranks)")
    print(f"report:  {wanted.out / REPORT}")
    print(f"next: rankwise fit --config {wanted.out / CONFIG}")


def _table(advice: Advice) -> str:
    """Every cut that was tried, smallest first."""
    rows = [
        [
            t.kind,
            str(t.rank),
            f"{t.parameters:,}",
            f"{100 * t.error:.1f} %",
            f"{t.score:.4f}",
            f"{t.lost:+.4f}",
            f"{t.low:+.4f} to {t.high:+.4f}",
            f"{100 * t.loss_back:.1f} %",
            "yes" if t.enough else "no",
        ]
        for t in sorted(advice.trials, key=lambda t: (t.kind, t.parameters))
    ]
    head = ["ranks", "largest r", "parameters", "error", advice.metric]
    head += ["lost", "95 %", "of the loss", "enough"]
    return table(head, rows)
