"""`rankwise predict`: labels, scores or text from a run's model."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import make_reporter
from rankwise.errors import UserError

__all__ = ["command"]


def command(
    run: Annotated[str, typer.Argument(help="Folder of a run.", metavar="RUN")],
    *,
    text: Annotated[
        list[str] | None, typer.Option(help="A text to predict; may be given again.")
    ] = None,
    pair: Annotated[
        list[str] | None, typer.Option(help="The second text that belongs to each --text.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A file of rows.", metavar="FILE")] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Write predictions here: .jsonl, .csv or .tsv.", metavar="FILE"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the base model is now, when it has moved.")
    ] = None,
    last: Annotated[
        bool, typer.Option("--last", help="Use the last adapter, not the best.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps")] = "auto",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest continuation of a language model.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawing.")] = 0,
) -> None:
    """Predict texts or the rows of a file with a run's model.

    Predictions go to the output as JSON lines, or to --out; metrics follow where rows have labels.

    Example: rankwise predict runs/first --text "a gripping story"
    """
    if (text is None) == (data is None):
        raise UserError("Give either --text (as often as needed) or --data FILE.")
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"--device must be auto, cpu, cuda or mps, got '{device}'.")
    writer = _writer(out)
    from rankwise.train import predict as room
    from rankwise.train.restore import restore

    loaded = restore(run, model=model, which="last" if last else "adapter")
    if data is not None:
        examples = room.examples_of_file(loaded, data)
    else:
        examples = room.examples_of_text(loaded, text or [], pair or [])
    made = room.predict(
        loaded,
        examples,
        batch_size=batch_size,
        device=device,
        generation=room.Generation(max_new_tokens, temperature, seed),
        reporter=make_reporter(),
    )
    writer(made.rows)
    if made.metrics is not None:
        line = ", ".join(f"{k} {v:.4f}" for k, v in made.metrics.items())
        part = f"{made.measured:,} of " if made.measured < len(made.rows) else ""
        print(f"{part}{len(made.rows):,} rows: {line}", file=sys.stdout if out else sys.stderr)
    if out:
        print(f"predictions: {out}")


def _writer(out: str | None) -> Any:
    if out is None:
        return lambda rows: print("".join(_line(row) for row in rows), end="")
    if Path(out).suffix not in (".jsonl", ".csv", ".tsv"):
        raise UserError(f"--out {out} must end in .jsonl, .csv or .tsv.")
    return lambda rows: _write(out, rows)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write(out: str, rows: list[dict[str, Any]]) -> None:
    from rankwise.io.files import write_text

    if out.endswith(".jsonl"):
        write_text(out, "".join(map(_line, rows)))
        return
    flat = [_flat(row) for row in rows]
    text = io.StringIO(newline="")
    dialect = "excel" if out.endswith(".csv") else "excel-tab"
    sheet = csv.DictWriter(text, fieldnames=list(flat[0]), dialect=dialect, lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(flat)
    write_text(out, text.getvalue())


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    shares = row.get("probabilities", {})
    rest = {k: v for k, v in row.items() if k != "probabilities"}
    return rest | {f"probability_{name}": share for name, share in shares.items()}
