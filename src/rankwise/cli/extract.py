"""`rankwise extract`: a LoRA adapter from the difference of two checkpoints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.cli.console import make_reporter, table

if TYPE_CHECKING:
    from rankwise.train.extracting import Extraction

__all__ = ["command"]


def command(
    base: Annotated[str, typer.Argument(help="The base model.", metavar="BASE")],
    tuned: Annotated[str, typer.Argument(help="What was fine-tuned from it.", metavar="TUNED")],
    *,
    out: Annotated[str, typer.Option(help="Folder to write.", metavar="FOLDER")],
    r: Annotated[
        int | None, typer.Option(help="Rank of the updates, or the most beside --energy.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each layer's change to hold, such as 0.9.")
    ] = None,
    only_lora: Annotated[
        bool,
        typer.Option("--only-lora", help="Leave out biases and modules that no update can hold."),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the random projections for large layers.")
    ] = 0,
) -> None:
    """Make a LoRA adapter from the difference of two checkpoints, layer by layer.

    Each linear layer that differs gets the nearest update of its rank, and the table says how much
    of the change that holds, beside what it would hold of a change without any structure. What no
    update can hold (norms, embeddings, a new head) is saved whole. Tensors are read one at a time.

    Example: rankwise extract bert-base-uncased my-tuned-bert --r 16 --out extracted
    """
    from rankwise.errors import UserError

    if r is None and energy is None:
        raise UserError("Say which rank, or how much of the change to hold: --r 16 or --energy 0.9")
    from rankwise.train.extracting import extract

    found = extract(
        base,
        tuned,
        out,
        r=r,
        energy=energy,
        only_lora=only_lora,
        seed=seed,
        reporter=make_reporter(),
    )
    print(_text(found))
    print(f"adapter: {out}")


def _text(found: Extraction) -> str:
    """The table of layers, those held worst first, and what it comes to."""
    ordered = sorted(found.layers.items(), key=lambda item: item[1].held)
    rows = [
        [
            name,
            f"{layer.outputs} x {layer.inputs}",
            f"{layer.norm / layer.base_norm:.3g}" if layer.base_norm else "–",
            str(layer.r),
            f"{100 * layer.held:.1f} %",
            f"{100 * layer.chance:.1f} %",
            "exact" if layer.exact else "randomised",
        ]
        for name, layer in ordered
    ]
    head = ["layer", "size", "‖Δ‖/‖W0‖", "r", "held", "by chance", "by"]
    return "\n".join([*([table(head, rows), ""] if rows else []), *_sentences(found)])


def _sentences(found: Extraction) -> list[str]:
    same = f"{found.untouched} tensors are the same and get nothing."
    told = [f"{len(found.layers)} linear layers differ; {same}", *_held(found)]
    if found.biases:
        told.append(f"{found.biases} biases differ; each is held exactly beside its update.")
    for why in dict.fromkeys(why for why, _ in found.whole.values()):
        own = {name: count for name, (reason, count) in found.whole.items() if reason == why}
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        told.append(
            f"saved whole, {sum(own.values()):,} parameters: {next(iter(own))}{more} ({why})."
        )
    told.extend(f"not in the adapter: {text}" for text in found.left_out)
    return told


def _held(found: Extraction) -> list[str]:
    """How much of the change the updates hold, where there are any."""
    layers = list(found.layers.values())
    if not layers:
        return []
    norm = math.hypot(*(layer.norm for layer in layers))
    chance = math.fsum(layer.chance * layer.norm**2 for layer in layers) / norm**2
    held = f"The updates hold {100 * found.held:.1f} % of the change Σ ‖Δ‖², in "
    held += f"{found.parameters:,} parameters; of a change without structure they would hold at "
    told = [f"{held}most {100 * chance:.1f} %."]
    rounding = math.hypot(*(layer.rounding for layer in layers))
    if rounding > 0.1 * norm:
        told.append(
            f"Up to {100 * min(1.0, rounding / norm) ** 2:.0f} % of the change may be no more than "
            "the rounding of the 16-bit weights, which has no low rank."
        )
    return told
