"""`rankwise convert`: an adapter from one file format to another, decision by decision."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["command"]

_FORMATS = "peft|loralib|mlx|kohya|diffusers|gguf"

Adapter = Annotated[str, typer.Argument(help="Folder or file of the adapter.", metavar="ADAPTER")]
To = Annotated[str, typer.Option(help="Format to write.", metavar=_FORMATS)]
Out = Annotated[str, typer.Option(help="Folder to write.", metavar="FOLDER")]
From = Annotated[
    str | None,
    typer.Option(
        "--from", help="Format to read; told by the files when not given.", metavar=_FORMATS
    ),
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Write PEFT's files so that this program computes the same from them.",
        metavar="vllm|sglang|llama.cpp|tgi",
    ),
]
Base = Annotated[
    str | None, typer.Option(help="Folder of the base model, or its config.json.", metavar="PATH")
]
Component = Annotated[
    str | None,
    typer.Option(help="Which model of a diffusion pipeline.", metavar="unet|text_encoder|..."),
]
MaxRank = Annotated[
    int | None, typer.Option(min=1, help="Largest rank that the reader is started with.")
]
Alpha = Annotated[
    float | None, typer.Option(help="loralib: lora_alpha of the training, not in its files.")
]
EnableLora = Annotated[
    list[str] | None,
    typer.Option(
        help="loralib: parts of a MergedLinear that were on, such as c_attn=101; repeatable.",
        metavar="NAME=BITS",
    ),
]
Parts = Annotated[
    str, typer.Option(help="loralib: names of the parts of a MergedLinear.", metavar="NAMES")
]
Embeddings = Annotated[str, typer.Option(help="loralib: adapted embeddings.", metavar="NAMES")]
Modules = Annotated[str, typer.Option(help="loralib: modules that trained whole.", metavar="NAMES")]
DropBase = Annotated[
    bool, typer.Option("--drop-base", help="loralib: leave out weights of the base.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open .bin, .pt and the like, as tensors only.")
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Let NaN and infinity pass.")
]


def command(
    adapter: Adapter,
    *,
    to: To,
    out: Out,
    source: From = None,
    reader: For = None,
    base: Base = None,
    component: Component = None,
    max_rank: MaxRank = None,
    alpha: Alpha = None,
    enable_lora: EnableLora = None,
    parts: Parts = "q_proj,k_proj,v_proj",
    embeddings: Embeddings = "",
    modules_to_save: Modules = "",
    drop_base: DropBase = False,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Convert an adapter between PEFT, loralib, MLX, kohya, diffusers and GGUF.

    The update stays the same; each thing that had to be folded, padded, joined or left out is
    printed, and what the target cannot hold is refused with the reason.

    Example: rankwise convert runs/first/adapter --to peft --for vllm --out served
    """
    from rankwise.io.convert import Wishes, convert
    from rankwise.io.loralib import Unsaid

    unsaid = Unsaid(
        alpha=alpha,
        enable_lora=dict(map(_bits, enable_lora or [])),
        parts=_words(parts),
        embeddings=_words(embeddings),
        modules=_words(modules_to_save),
        drop_base=drop_base,
    )
    wishes = Wishes(
        source=source,
        reader=reader,
        base=base,
        component=component,
        max_rank=max_rank,
        unsaid=unsaid,
        allow_pickle=allow_pickle,
        allow_nonfinite=allow_nonfinite,
    )
    for sentence in convert(adapter, to, out, wishes):
        print(sentence)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _bits(text: str) -> tuple[str, tuple[bool, ...]]:
    """``c_attn=101`` as the name and which parts are on."""
    from rankwise.errors import UserError

    name, _, bits = text.partition("=")
    if not name or not bits or set(bits) - {"0", "1"}:
        raise UserError(
            f"--enable-lora must be a name and a 1 or 0 for each part, such as c_attn=101, and is "
            f"'{text}'."
        )
    return name, tuple(bit == "1" for bit in bits)
