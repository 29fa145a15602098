"""`rankwise inspect`: the singular values of an adapter, and what rank they say it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.cli.console import table

if TYPE_CHECKING:
    from rankwise.lab.inspecting import Inspection

__all__ = ["command"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 16  # of the small pictures in the table


def command(
    adapter: Annotated[
        str, typer.Argument(help="Folder or file of an adapter, or a run.", metavar="ADAPTER")
    ],
    *,
    base: Annotated[
        str | None,
        typer.Option(help="Base model, for ‖W0‖ and the amplification.", metavar="MODEL"),
    ] = None,
    other: Annotated[
        str | None,
        typer.Option("--with", help="Another adapter of the same base, to compare directions."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    out: Annotated[
        str | None, typer.Option(help="Folder for the record and its page.", metavar="FOLDER")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Format of the adapter; told by the files when not given."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="loralib: lora_alpha of the training, not in its files.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Which model of a diffusion pipeline.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open .bin, .pt and the like, as tensors only.")
    ] = False,
) -> None:
    """Show an adapter's singular values, layer by layer, and what rank it uses.

    For every layer: ‖δ‖, the stable and the entropy rank, the ranks that hold 90, 99 and 99.9 % of
    the energy, and the rank behind which the singular values fall most. With the base (a run knows
    its own) also how large δ is beside W0 and what it amplifies; with --with how much two adapters
    share. The adapter may be in any format that Rankwise reads.

    Example: rankwise inspect runs/first --out evidence
    """
    import json

    from rankwise.io.convert import Wishes
    from rankwise.io.loralib import Unsaid
    from rankwise.lab.inspecting import inspect_adapter, write_inspection

    wishes = Wishes(
        source=source,
        base=base,
        component=component,
        unsaid=Unsaid(alpha=alpha),
        allow_pickle=allow_pickle,
    )
    found = inspect_adapter(adapter, other=other, wishes=wishes)
    page = None if out is None else write_inspection(found, out)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=2))
        return
    _show(found, adapter)
    if page is not None:
        print(f"report: {page}")


def _show(found: Inspection, adapter: str) -> None:
    from rankwise.lab.inspecting.figures import shade, short_names
    from rankwise.lab.inspecting.page import columns, layer_rows, summary

    top = max(layer.spectrum.spectral for layer in found.layers)
    names = short_names([layer.name for layer in found.layers])
    rows: list[list[str]] = []
    for name, layer, row in zip(names, found.layers, layer_rows(found), strict=True):
        steps = [shade(value, top) for value in layer.spectrum.values[:_WIDTH]]
        picture = "".join(" " if step is None else _BLOCKS[7 - step] for step in steps)
        more = "…" if len(layer.spectrum.values) > _WIDTH else ""
        cells = ["–" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row]
        rows.append([name, picture + more, *cells[1:]])
    head = list(columns(found))
    print(table([head[0], "singular values", *head[1:]], rows, left=2))
    print()
    for sentence in (*summary(found), *found.notes):
        print(sentence)
    if found.trained:
        print(f"next: rankwise trim {adapter} --energy 0.99 --out trimmed")
