"""What a PEFT configuration means on a model: which weights it adapts, in which forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from rankwise.errors import ArtifactError, UserError, nearest
from rankwise.io.base import input_embedding, tied_targets, tied_vocabulary
from rankwise.io.peft_config import PeftConfig
from rankwise.io.peft_entries import Paths, attention_of, forms_of, packed_attention
from rankwise.io.peft_forms import Form, Plain
from rankwise.io.peft_layout import Notes
from rankwise.io.peft_names import exact, within
from rankwise.io.sketch import own_modules
from rankwise.io.tensors import shown
from rankwise.layers import is_wrapped, refusal
from rankwise.methods.head import outermost, tied_partners
from rankwise.targets import ALL_LINEAR, Target, select, targets_of

__all__ = ["Meaning", "meaning"]


@dataclass(frozen=True)
class Meaning:
    """A configuration and our notes, read against one model.

    Attributes:
        modules: the base's own modules by name.
        targets: the adapted weights by name, those of tied partners among them.
        forms: how the file holds them.
        paths: how the file names everything else.
        tied: modules whose update is another's, and whose.
        alone: output projections of an attention that PEFT was told to adapt by themselves.
        whole: modules that train whole, the outermost of each.
        tokens: ids of trained rows by the embedding's name.
        problems: one sentence for each thing that is meant and cannot be.
    """

    modules: Mapping[str, nn.Module]
    targets: Mapping[str, Target]
    forms: tuple[Form, ...]
    paths: Paths
    tied: Mapping[str, str]
    alone: frozenset[str]
    whole: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    problems: tuple[str, ...]


@dataclass
class _Search:
    """What gathers while the names of a configuration are looked up."""

    config: PeftConfig
    notes: Notes
    model: nn.Module
    modules: Mapping[str, nn.Module]
    every: Mapping[str, Target]
    problems: list[str] = field(default_factory=list[str])
    names: dict[str, None] = field(default_factory=dict[str, None])
    alone: set[str] = field(default_factory=set[str])
    turned: set[str] = field(default_factory=set[str])
    tied: dict[str, str] = field(default_factory=dict[str, str])


def meaning(
    config: PeftConfig, notes: Notes, model: nn.Module, trained: list[str] | None
) -> Meaning:
    """Look up every name of a configuration; ``trained`` lists the modules trained whole, if known.

    Raises:
        ArtifactError: an expression in it is malformed or takes over two seconds.
    """
    modules = own_modules(model)
    search = _Search(config, notes, model, modules, _every(notes, model, modules))
    meant = _meant_modules(search)
    parameters = _meant_parameters(search)
    _follow_ties(search, meant)
    for name in meant:
        _add_module(search, name, meant)
    for name in parameters:
        owner, _, last = name.rpartition(".")
        search.names[owner if last == "weight" else name] = None
        search.turned.update({owner} if is_wrapped(modules[owner]) else ())
    search.names.update(dict.fromkeys(notes.own))
    fit = {n: t for n in search.names if (t := _fit(search, n)) is not None}
    targets = {n: fit[n] for n in search.every if n in fit}  # in the order of the model
    forms, paths = forms_of(
        targets, modules, dora=config.dora, alone=search.alone, turned=search.turned
    )
    whole = _whole(search) if trained is None else trained
    search.problems.extend(_beyond_peft(search, forms, targets))
    search.problems.extend(_other_ties(search, targets))
    if not search.names:
        search.problems.append("target_modules means no module of this model.")
    return Meaning(
        modules=modules,
        targets=targets,
        forms=tuple(forms),
        paths=paths,
        tied=search.tied,
        alone=frozenset(search.alone),
        whole=tuple(whole),
        tokens=_tokens(search),
        problems=tuple(search.problems),
    )


def _every(
    notes: Notes, model: nn.Module, modules: Mapping[str, nn.Module]
) -> Mapping[str, Target]:
    """Every weight of the model by name, with the parts that the notes tell of."""
    spelled = exact([name for name in notes.split if name in modules], modules)
    split = {target: notes.split[name] for name, target in spelled.items()}
    try:
        return targets_of(model, split)
    except UserError as error:
        raise ArtifactError(f"The parts of its fused projections do not fit: {error}") from error


def _meant_modules(search: _Search) -> dict[str, None]:
    rule = search.config.rule
    if rule.target_modules == ALL_LINEAR:
        linear = tuple(target.name for target in select(search.model, (ALL_LINEAR,)))
        rule = replace(rule, target_modules=linear)
    return dict.fromkeys(name for name in search.modules if rule.targets(name))


def _meant_parameters(search: _Search) -> list[str]:
    """Full names of the adapted parameters: an entry is a name, or its end after a dot."""
    wanted = search.config.parameters
    if not wanted:
        return []
    every = [
        f"{name}.{key}"
        for name, module in search.modules.items()
        for key, _ in module.named_parameters(recurse=False)
    ]
    ends = tuple(f".{entry}" for entry in wanted)
    found = [name for name in every if name in wanted or name.endswith(ends)]
    for entry in wanted:
        if not any(name == entry or name.endswith(f".{entry}") for name in found):
            hint = nearest(entry, every)
            search.problems.append(f"target_parameters: {shown(entry)} means no parameter.{hint}")
    return found


def _follow_ties(search: _Search, meant: dict[str, None]) -> None:
    """Add the modules that share another's update, by our notes or by PEFT's rule."""
    if search.notes.tied:
        search.tied.update(search.notes.tied)
    elif search.config.tied:
        embedding, *others = tied_vocabulary(search.model) or ("",)
        if not others:
            search.problems.append(
                "ensure_weight_tying is on, and this model has no layer tied to its input "
                "embedding: the base was another, or its tie is broken here."
            )
        if any(name in meant for name in (embedding, *others)):
            search.tied.update(dict.fromkeys(others, embedding))
    for name in dict.fromkeys([*search.tied.values(), *search.tied]):
        meant[name] = None


def _add_module(search: _Search, name: str, meant: Mapping[str, None]) -> None:
    """The adapted names that a module in the configuration stands for."""
    module = search.modules.get(name)
    parts = [n for n in search.notes.shares if n.rpartition(".")[0] == name]
    if isinstance(module, nn.MultiheadAttention):
        if packed_attention(module):
            usual = [f"{name}.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
            search.names.update(dict.fromkeys(parts or usual))
        else:
            search.problems.append(
                f"'{name}' keeps query, key and value in matrices of their own, which PEFT cannot "
                "adapt: the base was another."
            )
    elif parts:
        search.names.update(dict.fromkeys(parts))
    else:
        attention = attention_of(name, search.modules)
        search.alone.update({name} if attention is not None and attention not in meant else ())
        search.names[name] = None


def _fit(search: _Search, name: str) -> Target | None:
    """The weight of a name, if it can be adapted."""
    target = search.every.get(name)
    if target is not None:
        reason = refusal(search.modules[target.site.name], target.layout)
    elif name in search.modules:
        reason = refusal(search.modules[name])
    else:
        hint = nearest(name, search.every)
        search.problems.append(f"the model has no {shown(name)}, which was adapted.{hint}")
        return None
    if reason is not None:
        search.problems.append(f"'{name}' cannot be adapted: {reason}.")
        return None
    return target


def _beyond_peft(
    search: _Search, forms: list[Form], targets: Mapping[str, Target]
) -> Iterator[str]:
    """What a file of PEFT cannot hold, or does not mean as it says."""
    for form in forms:
        if isinstance(form, Plain) and form.target not in search.notes.own:
            yield f"PEFT has no DoRA for '{form.target}': the base was another."
    if search.config.dora and search.tied:
        yield (
            "use_dora and ensure_weight_tying are both on, and each of the tied layers has a "
            "magnitude of its own: Rankwise shares an update as a whole."
        )
    if search.config.by_rankwise:
        return
    for name, target in targets.items():
        if len(target.site.places) > 1:
            yield (
                f"'{name}' hangs in {len(target.site.places)} places of this model "
                f"({', '.join(target.site.places[:3])}), of which PEFT adapts the first alone; "
                "Rankwise adapts the module in all of them."
            )


def _other_ties(search: _Search, targets: Mapping[str, Target]) -> Iterator[str]:
    """Where this model ties other layers than the adapter's base did."""
    if not search.tied:
        return
    sources = [name for name in targets if name in search.modules and name not in search.tied]
    here = {name: set(others) for name, others in tied_partners(search.model, sources)}
    for name in sources:
        there = {twin for twin, source in search.tied.items() if source == name}
        if there != here.get(name, set()):
            was, now = (", ".join(sorted(n)) or "none" for n in (there, here.get(name, set())))
            yield (
                f"'{name}' shared its weight and its update with other layers where the adapter "
                f"was made ({was}), and shares its weight with others here ({now})."
            )


def _whole(search: _Search) -> list[str]:
    """Names of the modules that the configuration alone says train whole, the outermost of each.

    With ensure_weight_tying, PEFT trains and saves what is tied to a trained embedding as well.
    """
    config, modules = search.config, search.modules
    saved = [n for n, module in modules.items() if config.rule.saves(n) and module.state_dict()]
    twins = tied_vocabulary(search.model) if config.tied else ()
    if any(within(name, saved) for name in twins):
        saved.extend(twins)
    return outermost(saved)


def _tokens(search: _Search) -> dict[str, tuple[int, ...]]:
    """The embeddings whose rows train; a layer that is tied to one of them has the same rows."""
    found: dict[str, tuple[int, ...]] = {}
    vocabulary = tied_vocabulary(search.model)
    for entry, ids in search.config.tokens.items():
        known = search.notes.tokens.get(entry or "")
        end = entry or input_embedding(search.model) or "embed_tokens"
        meant = [known] if known else [name for name in search.modules if name.endswith(end)]
        if not meant or known not in (None, *search.modules):
            hint = nearest(end, search.modules)
            search.problems.append(
                f"trainable_token_indices: {shown(end)} means no module of this model.{hint}"
            )
        found.update(dict.fromkeys((n for n in meant if n in search.modules), ids))
    for name in [n for n in found if n in vocabulary[1:]]:
        if found[name] == found.get(vocabulary[0]):
            del found[name]
    search.problems.extend(_not_rows(search, found, vocabulary))
    return found


def _not_rows(
    search: _Search, tokens: Mapping[str, tuple[int, ...]], vocabulary: tuple[str, ...]
) -> Iterator[str]:
    for name, ids in tokens.items():
        module = search.modules[name]
        if not isinstance(module, nn.Embedding):
            yield (
                f"rows of '{name}' train by themselves (trainable_token_indices), and it is "
                f"{type(module).__name__}: Rankwise trains rows of embeddings, and of the layers "
                "tied to them."
            )
        elif max(ids) >= module.num_embeddings:
            yield (
                f"row {max(ids)} of '{name}' trained, and here are {module.num_embeddings} rows: "
                "the vocabulary of the base was larger. Resize it first."
            )
        elif name not in vocabulary and not search.config.by_rankwise:
            partners = tied_targets(search.model, search.every[name])
            if partners:
                yield (
                    f"'{partners[0].name}' holds the weight of '{name}', and PEFT, which is not "
                    "told of it, changed the rows of the latter alone."
                )
