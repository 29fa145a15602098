"""`rankwise combine`: several adapters as one, and what of them is lost in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.cli.console import table

if TYPE_CHECKING:
    from rankwise.methods.combining import Combination, Combined

__all__ = ["command"]

# The words of --how, and the flags that go with each.
_WAYS = {
    "concatenate": (),
    "svd": ("r", "energy"),
    "ties": ("density", "r"),
    "dare": ("density", "seed", "r"),
    "dare-ties": ("density", "seed", "r"),
    "magnitude": ("density", "r"),
}
_DENSITY = 0.5

Adapters = Annotated[
    list[str],
    typer.Argument(help="Folders or files of adapters, of any format.", metavar="ADAPTER"),
]
Out = Annotated[str, typer.Option(help="Folder to write.", metavar="FOLDER")]
Weights = Annotated[
    str | None,
    typer.Option(help="What each adapter counts; 1 each when not given.", metavar="1,0.5,..."),
]
How = Annotated[
    str, typer.Option(help="How updates of a layer become one.", metavar="|".join(_WAYS))
]
Rank = Annotated[
    int | None, typer.Option(min=1, help="Rank of the result; the largest one when not given.")
]
Energy = Annotated[
    float | None, typer.Option(help="svd: share of Σ σ² to keep, by the fewest ranks.")
]
Density = Annotated[
    float | None,
    typer.Option(help=f"Share of the entries of each update that stay; {_DENSITY} when not given."),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="dare: seed of what is dropped; 0 when not given.")
]
Head = Annotated[
    str | None,
    typer.Option(help="The adapter whose modules trained whole are kept.", metavar="ADAPTER"),
]
Base = Annotated[
    str | None,
    typer.Option(help="Folder of the base model; trained biases need it.", metavar="PATH"),
]
Alpha = Annotated[
    float | None, typer.Option(help="loralib: lora_alpha of the training, not in its files.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open .bin, .pt and the like, as tensors only.")
]


def command(
    adapters: Adapters,
    *,
    out: Out,
    weights: Weights = None,
    how: How = "concatenate",
    r: Rank = None,
    energy: Energy = None,
    density: Density = None,
    seed: Seed = None,
    head: Head = None,
    base: Base = None,
    alpha: Alpha = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Combine adapters of one base into one, and measure what is lost of each layer.

    The result is the weighted sum of the updates, exactly, or the best approximation of a lower
    rank (svd), or what TIES, DARE and pruning make of the updates. It is written in PEFT's format.

    Example: rankwise combine one two --weights 1,0.5 --how svd --r 16 --out both
    """
    wanted = _way(how, r, energy, density, seed)
    amounts = None if weights is None else _numbers(weights)
    from rankwise.io.combining import combine_folders
    from rankwise.io.convert import Wishes
    from rankwise.io.loralib import Unsaid

    wishes = Wishes(base=base, unsaid=Unsaid(alpha=alpha), allow_pickle=allow_pickle)
    made = combine_folders(adapters, out, amounts, wanted, head=head, wishes=wishes)
    print(_text(made.combined))
    for note in made.notes:
        print(note)
    print(f"adapter: {out}")


def _way(
    how: str, r: int | None, energy: float | None, density: float | None, seed: int | None
) -> Combination:
    """The combination that a word and its flags ask for."""
    from rankwise.errors import UserError, gather, nearest

    if how not in _WAYS:
        raise UserError(f"--how must be one of {', '.join(_WAYS)}.{nearest(how, _WAYS)}")
    flags = {"r": r, "energy": energy, "density": density, "seed": seed}
    strange = [n for n, value in flags.items() if value is not None and n not in _WAYS[how]]
    told = [f"--{name} does not go with --how {how}." for name in strange]
    gather(UserError, "rankwise combine", told)
    from rankwise.methods.combining import DARE, SVD, TIES, Concatenate, Magnitude

    share = _DENSITY if density is None else density
    ways: Mapping[str, Callable[[], Combination]] = {
        "concatenate": Concatenate,
        "svd": lambda: SVD(r, energy),
        "ties": lambda: TIES(share, r),
        "dare": lambda: DARE(share, seed or 0, r),
        "dare-ties": lambda: DARE(share, seed or 0, r, ties=True),
        "magnitude": lambda: Magnitude(share, r),
    }
    return ways[how]()


def _numbers(text: str) -> list[float]:
    from rankwise.errors import UserError

    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(
            f"--weights must be numbers with commas between them, such as 1,0.5, got '{text}'."
        ) from None


def _text(combined: Combined) -> str:
    """The table of layers, the worst first, and what it comes to over all of them."""
    cuts, shifts = combined.cuts, combined.shifts
    worst = sorted(cuts, key=lambda name: cuts[name].error, reverse=True)
    factors = combined.adapter.factors
    rows = [
        [name, str(factors[name].r), _percent(cuts[name].error), _percent(shifts[name].error)]
        for name in worst
    ]
    layers = table(["layer", "r", "lost", "from the sum"], rows)
    return (
        f"{layers}\n\n{len(rows)} layers: {_percent(combined.error)} of what was asked for is lost "
        f"by the rank; {_percent(combined.shift)} from the plain weighted sum."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %"
