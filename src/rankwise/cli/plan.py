"""`rankwise plan`: what would be adapted, without loading a weight."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.console import table
from rankwise.cli.options import given, with_options

if TYPE_CHECKING:
    from rankwise.train.planning import ModelPlan

__all__ = ["command"]


@with_options(groups=("Method",), names=("model", "revision", "task"))
def command(
    *,
    labels: Annotated[int, typer.Option(min=1, help="Classes of a classification head.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **options: Any,
) -> None:
    """Show which layers a method would adapt, their r and α, and what that costs.

    Example: rankwise plan --model roberta-base --r 8 --target-modules query,value
    """
    from rankwise.train.config import make_config, refuse_idle

    asked = given(options)
    settings = make_config({"data": "", "out": "", **asked}, "The options of rankwise plan")
    refuse_idle(asked, settings.method)
    from rankwise.train.planning import plan_model

    made = plan_model(settings, labels)
    print(json.dumps(dataclasses.asdict(made), indent=2) if as_json else _text(made))


def _text(plan: ModelPlan) -> str:
    rows = [
        [
            layer.name,
            layer.type,
            f"{layer.shape[0]} x {layer.shape[1]}",
            str(layer.r),
            f"{layer.alpha:g}",
            f"{layer.parameters:,}",
        ]
        for layer in plan.layers
    ]
    parts = [table(["layer", "type", "out x in", "r", "alpha", "parameters"], rows, left=2)]
    others = [[a.name, a.kind, f"{a.parameters:,}"] for a in plan.additions]
    if not rows:
        parts = [] if others else ["Nothing is added to any layer."]
    if others:
        parts.append(table(["module", "what is added", "parameters"], others, left=2))
    numbers, memory = plan.counts, plan.memory
    base, trained = numbers["base"] or 0, numbers["trainable"] or 0
    parts.append(
        f"{len(rows) + len(others)} updates, {numbers['adapter']:,} parameters in them, "
        f"{numbers['head']:,} in modules trained whole: {trained:,} of {base:,} train "
        f"({100 * trained / base:.3f} %)."
    )
    parts.append(
        f"Memory: frozen base {_size(memory['base_float32'])} in float32 or "
        f"{_size(memory['base_bfloat16'])} in bfloat16; trained parameters "
        f"{_size(memory['trained'])}, gradients {_size(memory['gradients'])}, AdamW "
        f"{_size(memory['optimizer'])}; activations come on top. Adapter file about "
        f"{_size(memory['adapter_file'])}."
    )
    return "\n\n".join([*parts, *plan.notes])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
