"""Which modules are adapted: names, suffixes, patterns, "all-linear", layer ranges, the head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import regex
from torch import Tensor, nn

from rankwise.errors import UserError, gather, nearest
from rankwise.layers import LoRALayer, is_conv1d, refusal

__all__ = [
    "ALL_LINEAR",
    "Head",
    "Site",
    "find_head",
    "first_match",
    "layer_index",
    "matches",
    "select",
    "shared_weights",
]

ALL_LINEAR = "all-linear"
PATTERN_SECONDS = 2.0
_META = frozenset("\\*+?[](){}|^$")


@dataclass(frozen=True)
class Site:
    """One module of a model and every place that holds it.

    Attributes:
        name: its first dotted name from ``model.named_modules()``.
        module: the module itself.
        owners: (parent, attribute) of every place where this same object hangs.
    """

    name: str
    module: nn.Module
    owners: tuple[tuple[nn.Module, str], ...]

    def put(self, module: nn.Module) -> None:
        """Hang another module in every place of this one."""
        for parent, attribute in self.owners:
            setattr(parent, attribute, module)


@dataclass(frozen=True)
class Head:
    """The output layer of a model.

    Attributes:
        names: module names that make up the head; empty when the model has none.
        kind: "classification" (a task head of transformers, fresh unless the checkpoint had it),
            "language-model" (the output embedding, pre-trained) or "output" (the last linear layer
            of any other module, outside every repeated block).
    """

    names: tuple[str, ...]
    kind: str

    def holds(self, name: str) -> bool:
        """Whether a module name is the head or lies inside it."""
        return any(name == head or name.startswith(head + ".") for head in self.names)


def is_pattern(text: str) -> bool:
    r"""Whether a target is a regular expression (it holds one of \ * + ? [ ] ( ) { } | ^ $)."""
    return not _META.isdisjoint(text)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means this module name.

    A plain text means the name itself or its end after a dot (``query`` means
    ``encoder.layer.0.attention.self.query``); a text with regular-expression signs must match the
    whole name (``re.fullmatch``).

    Raises:
        UserError: the expression is malformed, or takes over two seconds on one name.
    """
    if not is_pattern(pattern):
        return name == pattern or name.endswith("." + pattern)
    try:
        return regex.fullmatch(pattern, name, timeout=PATTERN_SECONDS) is not None
    except regex.error as error:
        raise UserError(f"The pattern '{pattern}' is not a regular expression: {error}.") from error
    except RecursionError as error:
        raise UserError(
            f"The pattern '{pattern[:60]}...' is nested too deeply. Write a simpler pattern."
        ) from error
    except TimeoutError as error:
        raise UserError(
            f"The pattern '{pattern}' took over {PATTERN_SECONDS:g} s on the name '{name}'; "
            "repeated groups inside repeats do that. Write a simpler pattern."
        ) from error


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first of ``patterns`` that means ``name``, or None."""
    return next((p for p in patterns if matches(p, name)), None)


def layer_index(name: str) -> int | None:
    """The number of the block a module lies in: the first all-digit part of its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def sites(model: nn.Module) -> dict[str, Site]:
    """Every module below ``model`` by its first name, with all the places that hold it.

    What lies inside an adapted layer is not listed: the layer stands for it.
    """
    named: dict[int, tuple[str, nn.Module]] = {}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, LoRALayer):
            inside.append(name + ".")
        if not name:
            continue
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        named.setdefault(id(module), (name, module))
        held = owners.setdefault(id(module), [])
        if all(p is not parent or a != attribute for p, a in held):
            held.append((parent, attribute))
    return {name: Site(name, module, tuple(owners[key])) for key, (name, module) in named.items()}


def select(
    model: nn.Module,
    target_modules: Sequence[str],
    exclude_modules: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> list[Site]:
    """The sites that the patterns mean, in the model's order.

    ``"all-linear"`` means every Linear and Conv1D that can be adapted, outside the head. Every
    target, exclude and layer number must mean at least one module. A plain name that means a
    module which cannot be adapted is an error; a regular expression passes over containers and
    modules without parameters, and is refused for any other module that cannot be adapted.

    Raises:
        UserError: lists every pattern without a match, with the nearest names, and every module
            that was named but cannot be adapted, with the reason.
    """
    if not target_modules:
        raise UserError("target_modules is empty; name at least one module, or 'all-linear'.")
    table = sites(model)
    adaptable = {name: s for name, s in table.items() if refusal(s.module) is None}
    problems: list[str] = []
    excluded = _excluded(exclude_modules, table, problems)
    chosen: set[str] = set()
    for pattern in dict.fromkeys(target_modules):
        found = _means(pattern, model, table)
        if not found:
            problems.append(_unmatched("target_modules", pattern, adaptable))
        wanted = [n for n in found if n not in excluded]
        chosen.update(n for n in wanted if n in adaptable)
        problems.extend(_unfit(pattern, [table[n] for n in wanted if n not in adaptable]))
    if layers is not None:
        chosen = _in_layers(chosen, layers, problems)
    gather(UserError, "The targets cannot be adapted as asked", problems)
    if not chosen:
        raise UserError("exclude_modules takes away every module that target_modules names.")
    return [s for name, s in table.items() if name in chosen]


def _means(pattern: str, model: nn.Module, table: dict[str, Site]) -> list[str]:
    if pattern != ALL_LINEAR:
        return [name for name in table if matches(pattern, name)]
    head = find_head(model)
    return [
        name
        for name, site in table.items()
        if (isinstance(site.module, nn.Linear) or is_conv1d(site.module))
        and refusal(site.module) is None
        and not head.holds(name)
    ]


def _excluded(patterns: Sequence[str], table: dict[str, Site], problems: list[str]) -> set[str]:
    taken: set[str] = set()
    for pattern in dict.fromkeys(patterns):
        found = [name for name in table if matches(pattern, name)]
        if not found:
            problems.append(_unmatched("exclude_modules", pattern, table))
        for name in found:
            taken.update(n for n in table if n == name or n.startswith(name + "."))
    return taken


def _unmatched(option: str, pattern: str, candidates: dict[str, Site]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in candidates))
    ends = [end for end in ends if not end.isdigit()]
    hint = nearest(pattern, [*ends, *candidates])
    names = ends or list(candidates)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    listed = f" Modules that can be adapted end in: {shown}." if shown else ""
    return f"{option}: '{pattern}' matches no module.{hint}{listed}"


def _unfit(pattern: str, unfit: list[Site]) -> Iterator[str]:
    for site in unfit:
        has_weights = any(True for _ in site.module.parameters(recurse=False))
        if is_pattern(pattern) and not has_weights:
            continue
        reason = refusal(site.module)
        yield (
            f"target_modules: '{pattern}' means '{site.name}', which cannot be adapted: {reason}. "
            "Name a part of it, narrow the pattern, or put it in exclude_modules."
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


def find_head(model: nn.Module) -> Head:
    """The output layer of a model: which part a task head or the vocabulary projection is.

    For a transformers model it is what hangs beside the base model (``base_model_prefix``), or
    the output embedding; for any other module it is the last Linear that lies outside every
    numbered block, or directly in a top-level Sequential.
    """
    if is_transformers(model):
        return _transformers_head(model)
    last: str | None = None
    for name, site in sites(model).items():
        inner = site.module.base_layer if isinstance(site.module, LoRALayer) else site.module
        parents = name.split(".")[:-1]
        if isinstance(inner, nn.Linear):
            repeated = any(part.isdigit() for part in parents)
            last = last if repeated or _inside_attention(model, parents) else name
    return Head((last,) if last is not None else (), "output")


def _inside_attention(model: nn.Module, parents: list[str]) -> bool:
    """Whether a Linear belongs to an attention or encoder layer, and so is no output layer."""
    owners = (".".join(parents[: i + 1]) for i in range(len(parents)))
    inner = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return isinstance(model, inner) or any(
        isinstance(model.get_submodule(owner), inner) for owner in owners
    )


def is_transformers(model: nn.Module) -> bool:
    """Whether this is a transformers model, told without importing transformers."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__ == "transformers.modeling_utils"
        for c in type(model).__mro__
    )


def _transformers_head(model: nn.Module) -> Head:
    names = {id(module): name for name, module in model.named_modules()}
    output: object = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(output, nn.Module) and id(output) in names:
        return Head((names[id(output)],), "language-model")
    prefix = str(model.base_model_prefix)
    children = dict(model.named_children())
    if prefix not in children:
        return Head((), "none")
    beside = [
        name
        for name, child in children.items()
        if name != prefix and any(True for _ in child.parameters())
    ]
    return Head(tuple(beside), "classification" if beside else "none")


def shared_weights(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of parameter names that share one storage, such as a tied embedding and output layer.

    Told by storage, not by name: the same Parameter object, or two that start at the same address.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(_storage(parameter), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _storage(tensor: Tensor) -> tuple[object, ...]:
    if tensor.is_meta or tensor.numel() == 0:
        return ("object", id(tensor))
    return (tensor.device, tensor.data_ptr())
