"""`rankwise fit`: train an adapter from a labelled file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import make_reporter
from rankwise.cli.options import given, with_options

__all__ = ["command"]


@with_options()
def command(
    *,
    config: Annotated[
        str | None,
        typer.Option(help="YAML file with these same options; flags win over it.", metavar="FILE"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out where it stopped.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every value in force, and stop.")
    ] = False,
    **options: Any,
) -> None:
    """Train a model on a labelled file and leave a run folder with its adapter.

    Example: rankwise fit --model bert-base-uncased --data train.tsv --eval dev.tsv --r 8
    --target-modules query,value --out runs/first
    """
    from rankwise.errors import UserError
    from rankwise.train.config import make_config, refuse_idle
    from rankwise.train.config_file import dump_config, read_config

    asked = given(options)
    values = asked if config is None else read_config(config) | asked
    if resume:
        from rankwise.train.resume import config_of_run

        if "out" not in values:
            raise UserError("--resume goes on with a run; name its folder: --resume --out FOLDER")
        settings = config_of_run(values["out"], values)
    else:
        settings = make_config(values, config or "The options of rankwise fit")
        refuse_idle(asked, settings.method)
    if print_config:
        print(dump_config(settings), end="")
        return
    from rankwise.train.run import fit

    with _advised(settings.out):
        result = fit(settings, resume=resume, reporter=make_reporter())
    _show(result.manifest, str(result.folder))


@contextlib.contextmanager
def _advised(out: str) -> Generator[None]:
    """Say how to go on where the program is stopped outside the steps, which say so themselves."""
    from rankwise.train import manifest

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        begun = (Path(out) / manifest.NAME).exists()
        advice = f"Go on with: rankwise fit --resume --out {out}"
        said = advice if begun else "Nothing was begun; the same command begins again."
        print(f"\n{said}", file=sys.stderr)
        raise


def _show(manifest: dict[str, Any], folder: str) -> None:
    numbers = manifest["counts"]
    share = 100 * numbers["trainable"] / numbers["base"]
    found = ", ".join(f"{k} {v:.4f}" for k, v in manifest["metrics"].items() if v is not None)
    print(
        f"{manifest['name']}: {found} (best by {manifest['metric']}, step {manifest['best_step']})"
    )
    print(
        f"trained {numbers['trainable']:,} of {numbers['base']:,} parameters ({share:.2f} %): "
        f"{numbers['adapter']:,} in updates, {numbers['head']:,} in whole modules"
    )
    print(
        f"time {manifest['seconds']['train']:.1f} s; on disk {manifest['artifact_bytes']:,} bytes"
    )
    if manifest["skipped_steps"]:
        print(f"{manifest['skipped_steps']} steps were skipped (loss or gradient not finite)")
    print(f"adapter: {folder}/adapter")
    merge = f"   or   rankwise merge {folder} --out merged"
    held = manifest["method"]["method"] not in ("bottleneck", "prefix")  # what a weight can hold
    print(f'next: rankwise predict {folder} --text "..."{merge if held else ""}')
