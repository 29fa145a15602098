"""Which weights are adapted: names, suffixes, patterns, "all-linear", layer ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from rankwise.errors import UserError, gather, nearest
from rankwise.layers import Split, is_conv1d, layouts, refusal
from rankwise.targets.heads import find_head
from rankwise.targets.patterns import is_pattern, layer_index, matches
from rankwise.targets.places import Site, Target, sites, targets_of

__all__ = ["ALL_LINEAR", "select"]

ALL_LINEAR = "all-linear"


def select(
    model: nn.Module,
    target_modules: Sequence[str],
    exclude_modules: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    split: Mapping[str, Split] | None = None,
) -> list[Target]:
    """The weights that the patterns mean, in the model's order.

    A weight is named by its module; a part of a fused projection or a bare parameter by what
    stands behind the module's name (``self_attn.q_proj`` of an nn.MultiheadAttention,
    ``experts.gate_up_proj``). ``"all-linear"`` means every Linear and Conv1D that can be adapted,
    outside the head. Every target, exclude and layer number must mean at least one module. A
    plain name that means a module which cannot be adapted is an error; a regular expression passes
    over containers and modules without parameters, and is refused for any other module that
    cannot be adapted.

    Raises:
        UserError: lists every pattern without a match, with the nearest names, and every module
            that was named but cannot be adapted, with the reason.
    """
    if not target_modules:
        raise UserError("target_modules is empty; name at least one module, or 'all-linear'.")
    modules = sites(model)
    table = targets_of(model, split, modules)
    fit = {n: t for n, t in table.items() if refusal(t.site.base, t.layout) is None}
    problems: list[str] = []
    names = list(dict.fromkeys([*modules, *table]))
    excluded = _excluded(exclude_modules, names, problems)
    chosen: set[str] = set()
    for pattern in dict.fromkeys(target_modules):
        found = _means(pattern, model, names, fit)
        if not found:
            problems.append(_nothing_found(pattern, model, table, list(fit)))
        wanted = [n for n in found if n not in excluded]
        chosen.update(n for n in wanted if n in fit)
        problems.extend(_unfit(pattern, [n for n in wanted if n not in fit], modules, table))
    if layers is not None:
        chosen = _in_layers(chosen, layers, problems)
    problems.extend(_overlaps(chosen, table))
    gather(UserError, "The targets cannot be adapted as asked", problems)
    if not chosen:
        raise UserError("exclude_modules takes away every module that target_modules names.")
    return [target for name, target in table.items() if name in chosen]


def _means(
    pattern: str, model: nn.Module, names: Sequence[str], fit: Mapping[str, Target]
) -> list[str]:
    if pattern != ALL_LINEAR:
        return [name for name in names if matches(pattern, name)]
    head = find_head(model)
    return [
        name
        for name, target in fit.items()
        if (isinstance(target.site.base, nn.Linear) or is_conv1d(target.site.base))
        and target.layout.part is None
        and not head.holds(name)
    ]


def _nothing_linear(model: nn.Module, table: Mapping[str, Target]) -> str:
    """Why "all-linear" means nothing in a model."""
    head = find_head(model)
    for name, target in table.items():
        if isinstance(target.site.base, nn.Linear) and not head.holds(name):
            reason = refusal(target.site.base, target.layout)
            return (
                f"target_modules: 'all-linear' means nothing here, as no Linear layer can be "
                f"adapted; of '{name}', {reason}. Name other layers."
            )
    return (
        f"target_modules: 'all-linear' means nothing here, as {type(model).__name__} has no "
        "Linear layer outside its output layer. Name other layers, such as embeddings or "
        "convolutions."
    )


def _nothing_found(
    pattern: str, model: nn.Module, table: Mapping[str, Target], fit: Sequence[str]
) -> str:
    if pattern == ALL_LINEAR:
        return _nothing_linear(model, table)
    if pattern in dict(model.named_parameters(recurse=False)):
        return (
            f"target_modules: '{pattern}' is a parameter of the model itself, which hangs in no "
            "place where an adapted one could stand for it. Put it into a module of its own."
        )
    return _unmatched("target_modules", pattern, fit)


def _excluded(patterns: Sequence[str], names: Sequence[str], problems: list[str]) -> set[str]:
    taken: set[str] = set()
    for pattern in dict.fromkeys(patterns):
        found = [name for name in names if matches(pattern, name)]
        if not found:
            problems.append(_unmatched("exclude_modules", pattern, names))
        for name in found:
            taken.update(n for n in names if n == name or n.startswith(name + "."))
    return taken


def _unmatched(option: str, pattern: str, candidates: Sequence[str]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in candidates))
    ends = [end for end in ends if not end.isdigit()]
    hint = nearest(pattern, [*ends, *candidates])
    names = ends or list(candidates)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    listed = f" Modules that can be adapted end in: {shown}." if shown else ""
    return f"{option}: '{pattern}' matches no module.{hint}{listed}"


def _unfit(
    pattern: str, names: list[str], modules: Mapping[str, Site], table: Mapping[str, Target]
) -> Iterator[str]:
    for name in names:
        target = table.get(name)
        module = target.site.base if target is not None else modules[name].base
        if is_pattern(pattern) and not _is_layer(module, target):
            continue
        reason = refusal(module, None if target is None else target.layout)
        yield (
            f"target_modules: '{pattern}' means '{name}', which cannot be adapted: {reason}. "
            "Name a part of it, narrow the pattern, or put it in exclude_modules."
        )


def _is_layer(module: nn.Module, target: Target | None) -> bool:
    """Whether a regular expression that means this can have been meant to."""
    if target is not None:
        return True
    return any(True for _ in module.parameters(recurse=False)) and not layouts(module)


def _overlaps(chosen: set[str], table: Mapping[str, Target]) -> Iterator[str]:
    for name in chosen:
        target = table[name]
        if target.layout.part is not None and target.site.name in chosen:
            yield (
                f"target_modules: '{target.site.name}' is named as a whole and in its part "
                f"'{name}'. Name the whole or its parts."
            )


def _in_layers(chosen: set[str], layers: Sequence[int], problems: list[str]) -> set[str]:
    if not layers:
        problems.append("layers: the list is empty; leave it out to adapt every block.")
    present = {i for i in (layer_index(n) for n in chosen) if i is not None}
    missing = [i for i in layers if i not in present]
    if missing:
        known = f"{min(present)} to {max(present)}" if present else "none"
        problems.append(
            f"layers: {', '.join(map(str, missing))} name no block that the targets occur in "
            f"(blocks there are: {known}, counted from 0)."
        )
    return {n for n in chosen if layer_index(n) in set(layers)}
