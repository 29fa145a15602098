"""The neutral adapter from the tensors of a PEFT file, each in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import mode

import torch
from torch import Tensor, nn

from rankwise.errors import ArtifactError, UserError
from rankwise.io.peft_config import PeftConfig
from rankwise.io.peft_extras import Exact, added_by, bias_parameters, change, frozen_rows
from rankwise.io.peft_forms import Form, Plain
from rankwise.io.peft_fused import OUT, Attention, Projection
from rankwise.io.peft_layout import Notes, Share
from rankwise.io.peft_meaning import Meaning
from rankwise.io.peft_names import exact, value_for
from rankwise.io.peft_places import Places, rank_of
from rankwise.io.tensors import shown
from rankwise.layers import dense_weight
from rankwise.lowrank import Factors, scaling
from rankwise.methods.adapter import Adapter, Tokens
from rankwise.methods.lora import LoRA

__all__ = ["Reading", "adapter_from"]


@dataclass(frozen=True)
class Reading:
    """All that is needed to make an adapter of a file.

    Attributes:
        config: its configuration.
        notes: what Rankwise noted in it.
        exact: tensors that Rankwise wrote by themselves.
        meant: what the configuration means on the model.
        places: its tensors in their places.
    """

    config: PeftConfig
    notes: Notes
    exact: Exact
    meant: Meaning
    places: Places


@dataclass
class _Parts:
    """The updates by name, as they come out of their forms."""

    pairs: dict[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict[str, tuple[Tensor, Tensor]]
    )
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    alphas: dict[str, float] = field(default_factory=dict[str, float])
    scales: dict[str, float] = field(default_factory=dict[str, float])
    problems: list[str] = field(default_factory=list[str])


def adapter_from(reading: Reading) -> tuple[Adapter | None, list[str]]:
    """The adapter, or None and what is wrong: where parts of the file contradict each other."""
    parts = _Parts()
    for form in reading.meant.forms:
        if form.target in reading.places.forms:
            _take_apart(reading, form, parts)
    parts.problems.extend(_other_twins(reading, parts))
    parts.problems.extend(_unused_attention(reading, parts))
    if parts.problems or reading.places.problems:
        return None, parts.problems
    try:
        method = _method(reading, parts)
    except UserError as error:
        raise ArtifactError(f"Its options do not go together: {error}") from error
    biases, problems = _biases(reading, parts)
    tokens = _tokens(reading)
    problems.extend(f"{shown(key)} belongs to nothing here." for key in reading.exact.tensors)
    if problems:
        return None, problems
    factors = {
        name: _factors(name, parts, method.spec(name).scale, reading.notes.shares.get(name))
        for name in parts.pairs
        if name not in reading.meant.tied
    }
    adapter = Adapter(
        method=method,
        factors=factors,
        modules=reading.meant.whole,
        trained=reading.places.trained,
        magnitudes=_magnitudes(reading),
        biases=biases,
        tokens=tokens,
    )
    return adapter, []


def _take_apart(reading: Reading, form: Form, parts: _Parts) -> None:
    """A, B, rank and α of each name in a form."""
    config, notes = reading.config, reading.notes
    shares = {name: notes.shares[name] for name in form.places if name in notes.shares}
    r = rank_of(form, config, notes)
    alpha = float(value_for(config.alpha_pattern, form.target, config.alpha))
    stabilized = config.rank_stabilized
    scale = scaling(r, alpha, stabilized)
    own = {name: scaling(each.r, each.alpha, stabilized) for name, each in shares.items()}
    first = next(iter(own.values()), scale)
    scale = first if isinstance(form, Plain) else scale  # which the configuration knows nothing of
    problem = _disagree(form, shares, r, first, scale)
    if problem is not None:
        parts.problems.append(problem)
        return
    rows = {name: share.rows for name, share in shares.items()}
    ratios = {name: each / first for name, each in own.items()}
    tensors = reading.places.forms[form.target]
    for name, (A, B) in form.unpack(tensors, rows, ratios).items():
        share = shares.get(name)
        rank = A.shape[-2] if share is None else share.r
        parts.pairs[name] = (A, reading.exact.find("B", name, B))
        parts.ranks[name] = rank
        parts.scales[name] = own.get(name, scale)
        if share is not None:
            parts.alphas[name] = share.alpha
        elif rank == r:
            parts.alphas[name] = alpha
        else:
            parts.alphas[name] = scale * (math.sqrt(rank) if stabilized else rank)


def _disagree(
    form: Form, shares: Mapping[str, Share], r: int, first: float, scale: float
) -> str | None:
    """Where our notes and the configuration say different things of one update."""
    if any(share.rows[1] > r for share in shares.values()):
        return f"rankwise.layout tells of more rows than the update of '{form.target}' has ({r})."
    if shares and not math.isclose(first, scale, rel_tol=1e-9):
        return (
            f"adapter_config.json gives the update of '{form.target}' the scale {scale:g}, and "
            f"rankwise.layout {first:g}: one of the two was changed."
        )
    return None


def _other_twins(reading: Reading, parts: _Parts) -> Iterator[str]:
    """Tied modules whose updates are not the same one."""
    for twin, source in reading.meant.tied.items():
        if twin not in parts.pairs or source not in parts.pairs:
            continue
        (A, B), (A0, B0) = parts.pairs[twin], parts.pairs[source]
        targets = reading.meant.targets
        if targets[twin].layout.transposed != targets[source].layout.transposed:
            A0, B0 = B0.mT, A0.mT
        if not (torch.equal(A, A0) and torch.equal(B, B0)):
            yield f"'{twin}' and '{source}' are tied, and the file has another update for each."


def _unused_attention(reading: Reading, parts: _Parts) -> Iterator[str]:
    for name in reading.meant.alone:
        if name in parts.pairs and bool(parts.pairs[name][1].any()):
            yield (
                f"'{name}' is the output projection of an nn.MultiheadAttention, and PEFT never "
                "applies an update that is put on it by itself. Take it out of target_modules and "
                "of the file; the other layers then load as PEFT runs them."
            )


def _factors(name: str, parts: _Parts, scale: float, share: Share | None) -> Factors:
    A, B = parts.pairs[name]
    return Factors(A, B, scale) if share is None else share.factors(A, B, scale)


def _method(reading: Reading, parts: _Parts) -> LoRA:
    """The method that means exactly these weights, with what the folder says of it."""
    config, notes, meant = reading.config, reading.notes, reading.meant
    names = [*meant.targets, *meant.modules]
    adapted = [name for name in parts.pairs if name not in meant.tied]
    spelled = exact((*adapted, *meant.whole, *meant.tokens), names)
    parted = exact(notes.split, meant.modules)
    r = mode(parts.ranks[n] for n in adapted)
    alpha = mode(parts.alphas[n] for n in adapted)
    trained = {"lora_only": "adapted", "all": "all"}.get(config.bias, "none")
    return LoRA(
        r=r,
        alpha=alpha,
        target_modules=tuple(spelled[n] for n in adapted),
        rank_stabilized=config.rank_stabilized,
        rank_pattern={spelled[n]: parts.ranks[n] for n in adapted if parts.ranks[n] != r},
        alpha_pattern={spelled[n]: parts.alphas[n] for n in adapted if parts.alphas[n] != alpha},
        dropout=notes.dropout or config.dropout,
        dora=config.dora,
        freeze_A=notes.freeze_A,
        bias="adapted" if trained == "none" and config.lora_bias else trained,  # pyright: ignore[reportArgumentType]
        trainable_tokens={spelled[n]: ids for n, ids in meant.tokens.items()},
        split={parted[n]: each for n, each in notes.split.items()},
        tied=config.tied or bool(notes.tied),
        slot=notes.slot,
        head="freeze",
        modules_to_save=tuple(spelled[n] for n in meant.whole),
    )


def _magnitudes(reading: Reading) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for form in reading.meant.forms if reading.config.dora else ():
        whole = reading.places.magnitudes[form.target]
        for name, layout in form.places.items():
            if isinstance(form, Projection):
                found[name] = whole[torch.tensor(layout.rows)]
            else:
                bank = () if layout.experts is None else (layout.experts,)
                found[name] = whole.reshape(*bank, layout.out_features)
    return found


def _biases(reading: Reading, parts: _Parts) -> tuple[dict[str, Tensor], list[str]]:
    """What was added to each bias: to the base's own, and by a bias of B."""
    modules, places = reading.meant.modules, reading.places
    frozen = bias_parameters(modules, ())
    found: dict[str, Tensor] = {}
    for name, there in places.biases.items():
        added = change(frozen[name], there) if name in frozen else there
        found[name] = reading.exact.find("bias", name, added)
    problems: list[str] = []
    noted = reading.notes.biases
    for form in reading.meant.forms:
        for key, bias in places.b_biases.get(form.target, {}).items():
            owner = form.target
            if isinstance(form, Attention):
                owner = form.output
                if not key.startswith(OUT):
                    if bool(bias.any()):
                        problems.append(
                            f"lora_B of '{form.target}' has a bias, and PEFT never applies it."
                        )
                    continue
            name = f"{owner}.bias"
            if noted is not None and name not in noted:
                continue
            scale = parts.scales[next(iter(form.places))]
            weight = dense_weight(modules[owner])
            added = reading.exact.find("bias", name, added_by(bias, scale, weight))
            found[name] = found[name] + added if name in found else added
    order = dict.fromkeys([*frozen, *found])  # as the model has them
    return {name: found[name] for name in order if name in found}, problems


def _tokens(reading: Reading) -> dict[str, Tokens]:
    found: dict[str, Tokens] = {}
    for name, ids in reading.meant.tokens.items():
        module = reading.meant.modules[name]
        assert isinstance(module, nn.Embedding)
        delta = change(frozen_rows(module, ids), reading.places.tokens[name])
        found[name] = Tokens(ids, reading.exact.find("tokens", name, delta))
    return found
