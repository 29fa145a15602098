"""The commands of `rankwise`, and how an error leaves it: one message, one exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import rankwise
from rankwise.cli import demo, fit, merge, plan, predict
from rankwise.errors import RankwiseError

__all__ = ["main"]

app = typer.Typer(
    name="rankwise",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, Callable[..., None]] = {
    "fit": fit.command,
    "predict": predict.command,
    "merge": merge.command,
    "plan": plan.command,
    "demo": demo.command,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        print(rankwise.__version__)
        raise typer.Exit


@app.callback()
def _rankwise(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    """Adapt a pre-trained model with low-rank updates (LoRA), and see what rank it needs."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and leave the process with its exit code.

    0 done; 2 a mistake in the request; 3 a damaged file; 4 something the machine lacks; 130 and
    143 stopped by Ctrl+C and SIGTERM; 1 a fault in Rankwise itself.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("RANKWISE_DEBUG") == "1"
    words = [word for word in words if word != "--debug"]
    try:
        app(words)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    from rankwise.cli.console import fail

    stopped = getattr(error, "number", None)
    if type(error).__name__ == "Interrupted" and isinstance(stopped, int):
        print(f"\n{error}", file=sys.stderr)
        return 128 + stopped
    if isinstance(error, RankwiseError):
        fail(str(error))
        return error.exit_code
    fail(
        f"A fault in Rankwise: {type(error).__name__}: {error}. Run again with --debug for the "
        "traceback, and please report it."
    )
    return 1
