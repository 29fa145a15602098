"""What LoRA adds to a model: low-rank updates, trained biases, token rows, and their tied twins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rankwise.attaching import Addition
from rankwise.errors import UserError, gather, nearest
from rankwise.inits import Fitted, Start
from rankwise.layers import (
    Layout,
    LoRALayer,
    LowRank,
    Offset,
    Shared,
    Spec,
    Switch,
    TokenRows,
    Update,
    adapt,
    is_wrapped,
    layout_of,
    low_rank,
    offset,
    place_of,
    refusal,
    token_rows,
)
from rankwise.lowrank import Factors
from rankwise.methods.head import tied_partners
from rankwise.targets import Site, Target, matches, sites

__all__ = [
    "add_bias",
    "add_low_rank",
    "add_shared",
    "add_tokens",
    "bias_sites",
    "fitted_starts",
    "tied_sites",
    "token_sites",
]

TOKENS = "tokens"


def add_low_rank(
    target: Target,
    spec: Spec,
    start: Start | None = None,
    factors: Factors | None = None,
    magnitude: Tensor | None = None,
    lent: bool = False,
) -> Addition:
    """A low-rank update for a target, with learned factors, or a given start, or as spec says.

    Factors that are ``lent`` become the update's own, and are copied else.
    """
    given = start if factors is None else _start_of(factors)

    def make(layer: LoRALayer, switch: Switch, _: Mapping[str, Update]) -> LowRank:
        update = low_rank(layer, target.layout, spec, switch, target.name, given, lent)
        with torch.no_grad():
            if factors is not None and factors.A0 is not None:
                update.lora_A.copy_(factors.A)
                update.lora_B.copy_(factors.B)
            if magnitude is not None and update.magnitude is not None:
                update.magnitude.copy_(magnitude)
        return update

    label = target.layout.suffix.removeprefix(".")
    return Addition(target.site, target.layout.parameter, target.name, make, label)


def _start_of(factors: Factors) -> Start:
    """A0 and B0 where there are any, else A and B themselves."""
    if factors.A0 is None or factors.B0 is None:
        return Start(factors.A, factors.B)
    return Start(factors.A0, factors.B0, subtract=True)


def add_shared(source: str, partner: Site, kind: str = "") -> Addition:
    """The same update once more, on another module that holds the same weight.

    Raises:
        UserError: the other module cannot be adapted.
    """
    _check(partner, f"'{source}' shares its weight with '{partner.name}'")
    layout = layout_of(partner.base)

    def make(_layer: LoRALayer, _switch: Switch, made: Mapping[str, Update]) -> Shared:
        first = made[source]
        assert isinstance(first, LowRank | TokenRows)
        return Shared(first, layout)

    name = f"{partner.name}.{kind}" if kind else partner.name
    return Addition(partner, layout.parameter, name, make, kind)


def add_bias(
    site: Site, parameter: str, shape: tuple[int, ...], values: Tensor | None = None
) -> Addition:
    """A trained change of a bias, zero at the start unless values are given."""
    layout = Layout(parameter, shape)

    def make(layer: LoRALayer, switch: Switch, _: Mapping[str, Update]) -> Offset:
        return offset(layer, layout, switch, values)

    return Addition(site, parameter, f"{site.name}.{parameter}", make, parameter)


def _check(site: Site, why: str) -> None:
    reason = refusal(site.base)
    if reason is not None:
        raise UserError(f"{why}, which cannot be adapted: {reason}.")


def add_tokens(site: Site, ids: Sequence[int], values: Tensor | None = None) -> Addition:
    """Trained rows of an embedding, unchanged at the start unless values are given.

    Raises:
        UserError: the embedding cannot be adapted.
    """
    _check(site, f"'{site.name}' is to have trained rows")
    layout = layout_of(site.base)

    def make(layer: LoRALayer, switch: Switch, _: Mapping[str, Update]) -> TokenRows:
        return token_rows(layer, layout, tuple(ids), switch, values)

    return Addition(site, layout.parameter, f"{site.name}.{TOKENS}", make, TOKENS)


def bias_sites(
    model: nn.Module, chosen: Sequence[Target], which: str, whole: Iterable[str]
) -> Iterator[tuple[Site, str, tuple[int, ...]]]:
    """The biases that train: of the adapted modules, or of all that do not train whole anyway.

    Gives the module, the bias's name in it and its shape.
    """
    owners = tuple(whole)
    adapted = {target.site.name for target in chosen}
    for name, site in sites(model).items():
        if which == "adapted" and name not in adapted:
            continue
        if any(name == o or name.startswith(o + ".") for o in owners):
            continue
        for parameter, tensor in site.base.named_parameters(recurse=False):
            if tensor.ndim == 1 and (parameter == "bias" or parameter.endswith("_bias")):
                yield site, parameter, tuple(tensor.shape)


def token_sites(
    model: nn.Module, tokens: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Site, Sequence[int]]]:
    """The embedding that each pattern means, with the ids of the rows that train.

    Raises:
        UserError: a pattern means no embedding or several, or an id is not one of its rows.
    """
    if not tokens:
        return
    table = {n: s for n, s in sites(model).items() if isinstance(s.base, nn.Embedding)}
    problems: list[str] = []
    found: list[tuple[Site, Sequence[int]]] = []
    for pattern, ids in tokens.items():
        meant = [site for name, site in table.items() if matches(pattern, name)]
        if len(meant) != 1:
            said = "no embedding" if not meant else f"{len(meant)} embeddings"
            problems.append(
                f"'{pattern}' means {said}; there are: {', '.join(table) or 'none'}."
                f"{nearest(pattern, table)}"
            )
            continue
        rows = layout_of(meant[0].base).in_features
        wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < rows]
        if wrong or not ids or len(set(ids)) < len(ids):
            problems.append(
                f"'{pattern}': the ids must be different whole numbers from 0 to {rows - 1}, got "
                f"{list(ids)[:8]}."
            )
        found.append((meant[0], ids))
    gather(UserError, "trainable_tokens", problems)
    yield from found


def fitted_starts(
    model: nn.Module, chosen: Sequence[Target], spec: Callable[[str], Spec], init: Fitted
) -> Mapping[str, Start]:
    """What a start that looks at the running model gives each target.

    Raises:
        UserError: a target is no layer that is run by itself, or the start has seen too little.
    """
    passive = [t.name for t in chosen if not is_wrapped(t.site.base)]
    if passive:
        raise UserError(
            f"{type(init).__name__} watches the inputs of layers, and '{passive[0]}' is a "
            "parameter that its owner reads. Use another start, or leave it out of target_modules."
        )
    places = [
        place_of(adapt(t.site.base, (t.layout.parameter,)), t.layout, spec(t.name), t.name)
        for t in chosen
    ]
    return init.fit(model, places)


def tied_sites(model: nn.Module, name: str) -> list[Site]:
    """The other modules that hold the weight of this one."""
    table = sites(model)
    return [table[n] for _, others in tied_partners(model, [name]) for n in others if n in table]
