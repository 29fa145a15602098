"""What a user should know of a choice of targets: ties, what all-linear leaves out, no merging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from rankwise.layers import quantization, refusal, rounds_inputs
from rankwise.methods.head import tied_partners
from rankwise.targets import Target, find_head, layer_index, matches, targets_of

__all__ = [
    "left_out_notes",
    "tied_notes",
    "tied_twice",
    "undropped_notes",
    "unmergeable_notes",
]


def tied_twice(model: nn.Module, chosen: Sequence[Target]) -> Iterator[str]:
    """A problem for each two targets that share one weight."""
    names = [target.site.name for target in chosen]
    for name, others in tied_partners(model, dict.fromkeys(names)):
        for other in others:
            if other in names and names.index(name) < names.index(other):
                yield (
                    f"'{name}' and '{other}' share one weight, and both are targets: the weight "
                    "would be adapted twice. Put one of them in exclude_modules, or say tied=True "
                    "for one update on both."
                )


def tied_notes(model: nn.Module, chosen: Sequence[Target]) -> Iterator[str]:
    """A sentence for each target that shares its weight with a module that is none."""
    for name, others in tied_partners(model, dict.fromkeys(t.site.name for t in chosen)):
        yield (
            f"'{name}' shares its weight with {', '.join(others)}: the update applies to '{name}' "
            "only, and merging gives it a weight of its own (tied=True puts it on both)."
        )


def left_out_notes(
    model: nn.Module,
    chosen: Sequence[Target],
    excluded: Sequence[str],
    layers: Sequence[int] | None,
) -> Iterator[str]:
    """What "all-linear" might be thought to mean and does not, a sentence for each kind.

    That is banks of weights, as of the experts of a mixture, which are no Linear layers, and
    Linear layers that cannot be adapted. What was excluded, or lies in other blocks, is not told.
    """
    head, named = find_head(model), {target.name for target in chosen}
    left = [
        target
        for name, target in targets_of(model).items()
        if name not in named
        and not head.holds(target.site.name)
        and not any(matches(p, name) or matches(p, target.site.name) for p in excluded)
        and (layers is None or layer_index(name) in layers)
    ]
    banks = [target.name for target in left if target.layout.bank]
    if banks:
        ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in banks)
        yield (
            f"'all-linear' leaves {len(banks)} bank(s) of weights frozen, the first being "
            f"'{banks[0]}': they are no Linear layers. To adapt them as well, name them in "
            f"target_modules: {', '.join(ends)}."
        )
    linear = [
        (t, refusal(t.site.base, t.layout)) for t in left if isinstance(t.site.base, nn.Linear)
    ]
    barred = [(target.name, reason) for target, reason in linear if reason is not None]
    if barred:
        yield (
            f"'all-linear' leaves {len(barred)} Linear layer(s) frozen that cannot be adapted, the "
            f"first being '{barred[0][0]}': {barred[0][1]}."
        )


def undropped_notes(chosen: Sequence[Target]) -> Iterator[str]:
    """A sentence about the embeddings, whose inputs are row numbers, where dropout is asked for."""
    names = [target.name for target in chosen if isinstance(target.site.base, nn.Embedding)]
    if names:
        yield (
            f"{', '.join(map(repr, names))}: the input of an Embedding is row numbers, so there is "
            "no dropout on its update."
        )


def unmergeable_notes(chosen: Sequence[Target]) -> Iterator[str]:
    """A sentence about the layers of which no merge can be made, said before they are trained."""
    rounding = [target for target in chosen if rounds_inputs(target.site.base)]
    if rounding:
        yield (
            f"{len(rounding)} adapted layer(s), the first being '{rounding[0].name}' "
            f"({quantization(rounding[0].site.base)}), round their inputs as well as their "
            "weights, so this adapter cannot be merged into this base. Save it, load it on the "
            "base unquantised and merge there; or load the base in 4 bits."
        )
