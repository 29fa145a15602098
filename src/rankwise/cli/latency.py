"""`rankwise latency`: what a forward pass costs with each kind of adapter, and merged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.console import make_reporter, table
from rankwise.cli.options import given, with_options
from rankwise.errors import UserError

if TYPE_CHECKING:
    from rankwise.lab.latency import LatencyRecord

__all__ = ["command"]


@with_options(
    groups=(),
    names=(
        *("revision", "task", "dtype", "device", "seed"),
        *("r", "alpha", "target_modules", "exclude_modules", "layers"),
        *("adapter_size", "prefix_length"),
    ),
)
def command(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a transformers model, its config.json, or its name on a hub.",
            metavar="CONFIG_OR_MODEL",
        ),
    ],
    *,
    batch_sizes: Annotated[str, typer.Option(help="Rows of a pass.", metavar="N,N")] = "1,8",
    lengths: Annotated[str, typer.Option(help="Tokens of a row.", metavar="N,N")] = "32,128",
    rounds: Annotated[
        int, typer.Option(min=3, help="Times that each variant is measured at each size.")
    ] = 20,
    out: Annotated[
        str, typer.Option(help="Folder of the records and the page.", metavar="FOLDER")
    ] = "runs/latency",
    **options: Any,
) -> None:
    """Time forward passes: plain, merged, and with each kind of adapter.

    All are timed in turn in one process, at each batch size and length. That a merged model costs
    nothing is shown by what it runs: the same modules, operators and floating-point operations.
    The weights are random, as the time does not depend on them.

    Example: rankwise latency bert-base-uncased --batch-sizes 1,16 --lengths 128 --out runs/latency
    """
    from rankwise.train.config import make_config

    asked = given(options)
    values = {"model": model, "data": "", "out": out, **asked}
    settings = make_config(values, "The options of rankwise latency")
    from rankwise.lab.latency import REPORT, Sizes, run_latency

    sizes = Sizes(_numbers(batch_sizes), _numbers(lengths), rounds, settings.seed)
    record = run_latency(settings, sizes, out, make_reporter())
    print(_text(record))
    print(f"\nreport: {Path(out) / REPORT}")


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"'{text}' is no list of whole numbers; write them as 1,8,32.")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _text(record: LatencyRecord) -> str:
    from rankwise.lab.latency import findings
    from rankwise.lab.latency.page import over

    parts: list[str] = []
    for batch, length in record.cells:
        rows = [
            [
                variant.name,
                f"{1000 * record.seconds(variant.name, batch, length).middle:.2f}",
                over(record.ratio(variant.name, batch, length)) if number else "",
                f"{variant.added:,}",
                f"{variant.operators:,}",
            ]
            for number, variant in enumerate(record.variants)
        ]
        header = [f"{batch} x {length}", "ms", "% over plain (95 %)", "added", "operators"]
        parts.append(table(header, rows))
    return "\n\n".join([*parts, findings(record)[0]])
