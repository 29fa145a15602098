"""`rankwise compare`: every method and rank on one task, under one schedule, in one report."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rankwise.cli.console import make_reporter
from rankwise.cli.options import given, with_options
from rankwise.lab.compare.options import SHARED, CompareConfig

__all__ = ["command"]


@with_options(groups=(), names=SHARED)
@with_options(config=CompareConfig)
def command(
    *,
    out: Annotated[
        str | None,
        typer.Option(help="Folder of the comparison; one that is there goes on.", metavar="DIR"),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="YAML file with these same options; flags win over it.", metavar="FILE"),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes at a time, one run each; when not given, as many as there are cores "
            "and memory for, and one on a GPU.",
        ),
    ] = None,
    together: Annotated[
        int,
        typer.Option(
            min=1,
            help="Let up to so many runs of a process go through the base in one pass, where they "
            "differ in rank, α and rates alone and have no dropout.",
        ),
    ] = 1,
    report_only: Annotated[
        bool,
        typer.Option("--report-only", help="Report what is finished in --out, and train nothing."),
    ] = False,
    **options: Any,
) -> None:
    """Train every method at every rank under one schedule, and report what differs.

    Full fine-tuning, the head alone, BitFit, bottleneck adapters, prefix tuning and LoRA over its
    ranks. The learning rate of each comes from the same small search on rows set aside from the
    training rows. Each setting is trained under several seeds; report.html says which differences
    are larger than the noise. A comparison that was stopped goes on with: rankwise compare --out
    DIR

    Example: rankwise compare --model bert-base-uncased --data train.tsv --eval dev.tsv
    --target-modules query,value --out runs/compare
    """
    from rankwise.errors import UserError
    from rankwise.lab.compare.running import report_compare, run_compare
    from rankwise.train.config_file import read_config

    values = given({"out": out, **options})
    if report_only:
        beside = [name for name in values if name not in ("out", "reference")]
        beside += [] if jobs is None else ["jobs"]
        beside += [] if together == 1 else ["together"]
        if beside:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in beside)
            raise UserError(f"--report-only trains nothing, so leave out {flags}.")
    typed = values.get("reference")
    if config is not None:
        values = read_config(config) | values
    if "out" not in values:
        raise UserError("--out is required: the folder of the comparison.")
    folder = str(values.pop("out"))
    if report_only:
        found = report_compare(folder, typed)
    else:
        compared = {k: values.pop(k) for k in CompareConfig.model_fields if k in values}
        found = run_compare(
            folder, values, compared, jobs=jobs, together=together, reporter=make_reporter()
        )
    print(found.summary())
    print(f"\nreport: {found.report}")
