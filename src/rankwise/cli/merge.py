"""`rankwise merge`: a run as a plain transformers model folder, with a certificate."""

from __future__ import annotations

from typing import Annotated

import typer

from rankwise.cli.console import make_reporter

__all__ = ["command"]


def command(
    run: Annotated[str, typer.Argument(help="Folder of a run.", metavar="RUN")],
    *,
    out: Annotated[str, typer.Option(help="Folder to write.", metavar="FOLDER")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of the merged weights; the base's own when not given.",
            metavar="float32|bfloat16|float16",
        ),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(help="Rows to measure the merge on; the run's evaluation rows by default."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the base model is now, when it has moved.")
    ] = None,
    last: Annotated[
        bool, typer.Option("--last", help="Merge the last adapter, not the best.")
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write model.onnx as well, for onnxruntime.")
    ] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="Write model.pt2 as well, for torch.export.load.")
    ] = False,
) -> None:
    """Merge a run's adapter into its base and write a plain transformers model folder.

    The merged model needs no Rankwise, and has the base's own kinds of layers. certificate.json
    beside it says how far it is from the adapted model on real rows; a merge that is too far off
    is not written.

    With --onnx and --torch-export the folder also holds the merged model for programs without
    transformers. Each such file is run on the same rows and on another shape and must give what
    the merged model gives. It takes any number of rows and any length the model takes, and gives
    logits, without a cache for generation.

    Example: rankwise merge runs/first --out merged --onnx
    """
    from rankwise.errors import UserError

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype must be float32, bfloat16 or float16, got '{dtype}'.")
    from rankwise.train.export import merge_run
    from rankwise.train.exported import Onnx, TorchExport

    certificate = merge_run(
        run,
        out,
        model=model,
        which="last" if last else "adapter",
        dtype=dtype,
        probe=probe,
        exports=[form for form, asked in ((Onnx(), onnx), (TorchExport(), torch_export)) if asked],
        reporter=make_reporter(),
    )
    print(f"{certificate.line()}; measured on {certificate.probe}")
    print(f"merged model: {out} (a transformers folder; load it as any other)")
