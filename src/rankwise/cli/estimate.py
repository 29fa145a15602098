"""`rankwise estimate`: the memory that training needs, from the config alone."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.console import make_reporter, table
from rankwise.cli.options import given, with_options
from rankwise.errors import UserError

if TYPE_CHECKING:
    from rankwise.lab.estimate import Estimate

__all__ = ["command"]

_LEFT_OUT = {
    "cuda": "Not in it: CUDA's context and kernels (some hundred MB), what its allocator keeps of "
    "freed memory, and what an operation holds inside itself.",
    "cpu": "Not in it: what an operation holds inside itself, and the rows and their tokens.",
    "mps": "Told as for a CPU: what Metal holds besides is not in it.",
}
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{prefix}i": 1024**n for n, prefix in enumerate("kmgt", 1)}


@with_options(
    groups=("Method",),
    names=(
        *("revision", "task", "dtype", "device", "max_length"),
        *("batch_size", "accumulate", "recompute", "gradient_checkpointing", "eval_batch_size"),
        *("base_dropout", "pack"),
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
    budget: Annotated[
        str | None,
        typer.Option(help="Memory to fit in, such as 8GiB or 500MB.", metavar="SIZE"),
    ] = None,
    labels: Annotated[int, typer.Option(min=1, help="Classes of a classification head.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **options: Any,
) -> None:
    """Estimate the memory that training needs, and the largest batch within a budget.

    A training step and an evaluation pass run as rankwise fit would run them, on tensors that have
    shapes and no data; what is alive at once is added up. No weight is loaded.

    Example: rankwise estimate bert-base-uncased --batch-size 16 --max-length 256 --budget 8GiB
    """
    from rankwise.train.config import make_config

    room = None if budget is None else _bytes(budget)
    values = {"model": model, "data": "", "out": "", **given(options)}
    settings = make_config(values, "The options of rankwise estimate")
    from rankwise.lab.estimate import estimate

    made = estimate(settings, labels, room, make_reporter())
    if as_json:
        tree = dataclasses.asdict(made) | {"phases": made.phases, "peak": made.peak}
        print(json.dumps(tree, indent=2))
    else:
        print(_text(made))


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b\s*", text, re.IGNORECASE)
    if found is None or not (size := int(float(found[1]) * _UNITS.get(found[2].lower(), 0))):
        raise UserError(
            f"--budget '{text}' is no amount of memory. Give a number and a unit: 8GiB, 24GB, "
            "500MB."
        )
    return size


def _text(made: Estimate) -> str:
    from rankwise.lab.words import count, size

    told = {
        "packed copies": "packed copies of frozen weights (--pack no makes none)",
        "gradients": f"gradients so far, of {size(made.gradients)} that all take",
        "activations": "activations, and what operations work on",
    }
    held = {name: part for name, part in made.step.items() if part or name != "packed copies"}
    parts = [[told.get(name, name), size(part)] for name, part in held.items()]
    besides = {
        "the process: Python and its libraries": made.overhead,
        "freed memory that the C library keeps (a guess)": made.kept,
    }
    parts += [[name, size(part)] for name, part in besides.items() if part]
    phases = [[name, size(peak)] for name, peak in made.phases.items()]
    most = max(made.phases, key=lambda name: made.phases[name])
    shape = f"passes of {count(made.batch, 'row')} of {count(made.length, 'token')}"
    return "\n\n".join(
        [
            f"{made.model} ({made.task}): {made.method} on {made.device}, {shape}.",
            table(["held at the peak of a training step", "bytes"], parts),
            table(["phase of a run", "peak"], phases),
            f"Peak: {size(made.peak)}, in the phase: {most}.",
            *_verdict(made),
            *made.notes,
            _LEFT_OUT[made.device],
        ]
    )


def _verdict(made: Estimate) -> list[str]:
    """What fits in the budget, where there is one."""
    from rankwise.lab.words import size

    budget = made.budget
    if budget is None:
        return []
    fits = "fits" if budget.fits else "does not fit"
    lines = [f"The run {fits} in {size(budget.bytes)}."]
    steps = f"Largest --batch-size whose training steps fit: {_rows(budget.batch)}"
    if budget.checkpointed is not None:
        steps += f"; with --gradient-checkpointing: {_rows(budget.checkpointed)}"
    lines.append(f"{steps}.")
    others = {name: peak for name, peak in made.phases.items() if name != "training step"}
    for name, peak in others.items():
        if peak > budget.bytes:
            how = f"; lower --eval-batch-size (now {made.eval_batch})"
            lines.append(f"The {name} alone needs {size(peak)}{how * (name == 'evaluation')}.")
    return ["\n".join(lines)]


def _rows(batch: int) -> str:
    from rankwise.lab.estimate import MOST_ROWS

    if batch == 0:
        return "none, not even 1"
    return f"{batch:,}" + " or more" * (batch == MOST_ROWS)
