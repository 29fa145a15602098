"""`rankwise count`: what every method would train, in parameters and bytes, without weights."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.console import table
from rankwise.cli.options import given, with_options

if TYPE_CHECKING:
    from rankwise.train.counting import ModelCount

__all__ = ["command"]


@with_options(groups=("Method",), names=("revision", "task"))
def command(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a transformers model, its config.json, or its name on a hub.",
            metavar="CONFIG_OR_MODEL",
        ),
    ],
    *,
    labels: Annotated[int, typer.Option(min=1, help="Classes of a classification head.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **options: Any,
) -> None:
    """Count what every method would train on a model, without loading a weight.

    Parameters by formula and by counting, adapters and head apart, and bytes of the adapter's file,
    of the gradients and of the optimiser's state.

    Example: rankwise count roberta-base --r 8 --target-modules query,value --labels 3
    """
    from rankwise.train.config import make_config, refuse_idle

    asked = given(options)
    values = {"model": model, "data": "", "out": "", **asked}
    settings = make_config(values, "The options of rankwise count")
    if "method" in asked:
        refuse_idle(asked, settings.method)
    from rankwise.train.counting import METHODS, count_model

    made = count_model(settings, labels, [asked["method"]] if "method" in asked else METHODS)
    print(json.dumps(dataclasses.asdict(made), indent=2) if as_json else _text(made))


def _text(made: ModelCount) -> str:
    from rankwise.lab import words

    header = ["method", "formula", "counted", "head", "trained", "% of base", "file", "gradients"]
    rows = [
        [
            method.name,
            "–" if method.formula is None else f"{method.formula:,}",
            f"{method.adapter:,}",
            f"{method.head:,}",
            f"{method.trained:,}",
            words.percent(method.share),
            words.size(method.file_bytes),
            words.size(method.gradient_bytes),
            words.size(method.optimizer_bytes),
        ]
        for method in made.methods
    ]
    shapes = [
        f"{words.count(s.layers, 'adapted layer')} of {s.out_features:,} x {s.in_features:,}, "
        f"r = {s.r}: {s.update:,} in each in place of {s.dense:,}, {_times(s.dense / s.update)} "
        "times fewer."
        for s in made.shapes
    ]
    legend = (
        "formula: Σ r · (in + out) over the adapted layers; counted: parameters that are added and "
        "train; file: bytes of the tensors saved; gradients and AdamW's two moments in float32."
    )
    parts = [
        f"{made.model}, {made.task}: {made.base:,} parameters, its head among them.",
        table([*header, "AdamW"], rows),
        *(["\n".join(shapes)] if shapes else []),
        legend,
        *made.notes,
    ]
    return "\n\n".join(parts)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
