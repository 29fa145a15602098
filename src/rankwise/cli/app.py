"""The commands of `rankwise`, and how an error leaves it: one message, one exit code."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Collection, Generator
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

import rankwise
from rankwise.errors import RankwiseError

__all__ = ["COMMANDS", "main", "make_app"]

# Each command by the file of its name, with its line in the list of commands. A command's file is
# imported only when the command is called, so that `rankwise --help` answers at once.
COMMANDS = {
    "fit": "Train a model on a labelled file and leave a run folder with its adapter.",
    "predict": "Predict texts or the rows of a file with a run's model.",
    "convert": "Convert an adapter between PEFT, loralib, MLX, kohya, diffusers and GGUF.",
    "combine": "Combine adapters of one base into one, and measure what is lost of each layer.",
    "advise": "Find the smallest rank that is as good as a generous one, and a config for it.",
    "inspect": "Show an adapter's singular values, layer by layer, and what rank it uses.",
    "trim": "Cut an adapter to the smallest one that keeps a promise, and say what it costs.",
    "extract": "Make a LoRA adapter from the difference of two checkpoints, layer by layer.",
    "merge": "Merge a run's adapter into its base and write a plain transformers model folder.",
    "count": "Count what every method would train on a model, without loading a weight.",
    "plan": "Show which layers a method would adapt, their r and α, and what that costs.",
    "estimate": "Estimate the memory that training needs, and the largest batch within a budget.",
    "latency": "Time forward passes: plain, merged, and with each kind of adapter.",
    "compare": "Train every method at every rank under one schedule, and report what differs.",
    "theory": "Train updates of every rank on a linear layer, beside the bounds that hold there.",
    "demo": "Try LoRA on a real encoder and real text, on this machine, in minutes.",
}


_CTRL_C, _TERMINATED = 130, 143
_VALUES = {"int": "N", "float": "X", "str": "TEXT"}  # what help calls the value of a flag


def make_app(wanted: Collection[str]) -> typer.Typer:
    """The command with the flags of the wanted commands; the others have their line alone."""
    app = typer.Typer(
        name="rankwise",
        cls=_Group,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_rankwise)
    for name, line in COMMANDS.items():
        if name in wanted:
            command = importlib.import_module(f"rankwise.cli.{name}").command
            app.command(name, cls=_Command, help=_paragraphs(command.__doc__))(command)
        else:
            app.command(name, help=line)(_elsewhere)
    return app


class _Command(typer.core.TyperCommand):
    """A command whose help shows what a flag takes in a word, and nothing for one that is on."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _named(super().get_params(ctx))


class _Group(typer.core.TyperGroup):
    """The same for the flags of `rankwise` itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _named(super().get_params(ctx))


def _named(flags: list[Any]) -> list[Any]:
    for flag in flags:
        if flag.metavar is None and isinstance(flag, typer.core.TyperOption):
            flag.metavar = "" if flag.is_bool_flag else _VALUES.get(flag.bare_type())
    return flags


def _paragraphs(text: str | None) -> str:
    """A docstring with each paragraph in one line, to be wrapped where the terminal ends."""
    parts = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


def _elsewhere() -> None:
    """Stands for a command that was not called."""


def _version(wanted: bool) -> None:
    if wanted:
        print(rankwise.__version__)
        raise typer.Exit


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
        with _terminable():
            make_app(words[:1])(words)
    except (KeyboardInterrupt, SystemExit) as left:
        code = left.code if isinstance(left, SystemExit) else _CTRL_C
        if code not in (_CTRL_C, _TERMINATED):
            raise
        print("\nStopped.", file=sys.stderr)  # typer turns a KeyboardInterrupt into this code
        sys.exit(code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error))


@contextlib.contextmanager
def _terminable() -> Generator[None]:
    """SIGTERM leaves the block as Ctrl+C does, so that what was half written is taken away."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(_TERMINATED)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
