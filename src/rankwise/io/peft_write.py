"""An adapter as the content of PEFT's folder: the configuration, the tensors and our notes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankwise.errors import UserError, gather, nearest
from rankwise.io.base import Base
from rankwise.io.peft_config import OURS
from rankwise.io.peft_entries import Paths, forms_of
from rankwise.io.peft_extras import (
    Exact,
    absolute,
    added_by,
    bias_keys,
    bias_parameters,
    bias_within,
    change,
    frozen_rows,
    tokens_key,
)
from rankwise.io.peft_forms import Form, Parameter, Plain
from rankwise.io.peft_fused import Attention, Projection
from rankwise.io.peft_keys import PREFIX
from rankwise.io.peft_layout import Notes, Share
from rankwise.io.peft_names import Rule, entries, patterns, saved_entries, within
from rankwise.io.tensors import shown
from rankwise.layers import dense_weight, is_conv1d, layout_of
from rankwise.lowrank import Factors
from rankwise.methods.adapter import Adapter
from rankwise.targets import Target, first_match

__all__ = ["Content", "content"]


@dataclass(frozen=True)
class Content:
    """What is written: adapter_config.json, the tensors by their names in the file, the notes."""

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    notes: Notes


@dataclass
class _Draft:
    """What gathers while the parts of an adapter are laid out."""

    adapter: Adapter
    base: Base
    forms: list[Form]
    paths: Paths
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    exact: Exact = field(default_factory=Exact)
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    alphas: dict[str, float] = field(default_factory=dict[str, float])
    shares: dict[str, Share] = field(default_factory=dict[str, Share])
    scales: dict[str, float] = field(default_factory=dict[str, float])
    lora_bias: bool = False
    foreign: bool = False


def content(adapter: Adapter, base: Base, *, revision: str | None = None) -> Content:
    """Lay an adapter out as PEFT has it.

    Raises:
        UserError: the adapter contradicts itself or the base, or PEFT's matching rules cannot name
            its modules apart.
    """
    gather(UserError, "The adapter contradicts itself", list(_contradictions(adapter, base)))
    copies, tied = _copies(adapter, base)
    targets = {**base.targets, **{name: target for name, (target, _) in copies.items()}}
    factors = {**adapter.factors, **{name: each for name, (_, each) in copies.items()}}
    forms, paths = forms_of(targets, base.modules, dora=adapter.method.dora)
    draft = _Draft(adapter, base, forms, paths)
    for form in forms:
        _lay_out(draft, form, {name: factors[name] for name in form.places}, tied)
    _magnitudes(draft)
    _biases(draft)
    tokens = _tokens(draft)
    for name, tensor in {**base.bystanders, **adapter.trained}.items():
        draft.tensors[paths.tensor(name)] = tensor
    hung = (base.places.get(name, 1) for name in {t.site.name for t in targets.values()})
    draft.foreign |= any(isinstance(form, Plain) for form in forms) or any(n > 1 for n in hung)
    notes = _notes(draft, tied)
    config = _config(draft, tokens, tied, revision)
    named = {PREFIX + key: tensor for key, tensor in draft.tensors.items()}
    return Content(config, {**named, **draft.exact.tensors}, notes)


def _contradictions(adapter: Adapter, base: Base) -> Iterator[str]:
    for name, factors in adapter.factors.items():
        spec = adapter.method.spec(name)
        if name not in base.targets:
            hint = nearest(name, base.names)
            yield f"'{name}' is no weight of this base that can be adapted.{hint}"
        elif spec.r != factors.r or not math.isclose(spec.scale, factors.scale):
            yield (
                f"'{name}': its factors have rank {factors.r} and scale {factors.scale:g}, and its "
                f"method says {spec.r} and {spec.scale:g}."
            )
    for name in (n for n in adapter.tokens if n not in base.modules):
        yield f"the base has no embedding '{name}' for the trained rows.{nearest(name, base.names)}"


def _copies(
    adapter: Adapter, base: Base
) -> tuple[dict[str, tuple[Target, Factors]], dict[str, str]]:
    """The updates of tied modules once more under the partner's name, and whose they are."""
    copies: dict[str, tuple[Target, Factors]] = {}
    tied: dict[str, str] = {}
    for name, partners in base.partners.items():
        for target in partners:
            factors = adapter.factors[name].pair()
            if target.layout.transposed != base.targets[name].layout.transposed:
                factors = Factors(
                    factors.B.mT.contiguous(), factors.A.mT.contiguous(), factors.scale
                )
            copies[target.name] = (target, factors)
            tied[target.name] = name
    return copies, tied


def _lay_out(
    draft: _Draft, form: Form, factors: Mapping[str, Factors], tied: Mapping[str, str]
) -> None:
    """The tensors of one form, and what PEFT is told of its rank and α."""
    method = draft.adapter.method
    pairs = {name: each.pair() for name, each in factors.items()}
    packed = form.pack(pairs)
    draft.tensors.update({f"{form.path}.{key}": t for key, t in packed.tensors.items()})
    draft.scales[form.target] = packed.scale
    ratios = {name: pair.scale / packed.scale for name, pair in pairs.items()}
    for name, (_, B) in form.unpack(packed.tensors, packed.rows, ratios).items():
        draft.exact.keep("B", name, pairs[name].B, B)
    first = next(iter(factors))
    spec = method.spec(tied.get(first, first))
    noted = isinstance(form, Attention | Projection | Plain) or packed.r != spec.r
    draft.ranks[form.target] = packed.r
    alpha = _alpha(packed.scale, packed.r, method.rank_stabilized) if noted else spec.alpha
    draft.alphas[form.target] = alpha
    for name in (n for n in factors if noted and n not in tied):
        spec, start = method.spec(name), pairs[name].r - factors[name].r
        draft.shares[name] = Share(spec.r, spec.alpha, packed.rows[name], start)


def _alpha(scale: float, r: int, stabilized: bool) -> float:
    """α for which a rank gives this s, without the last digits that multiplying left."""
    alpha = scale * (math.sqrt(r) if stabilized else r)
    near = round(alpha)
    return float(near) if math.isclose(alpha, near, rel_tol=1e-12) else alpha


def _magnitudes(draft: _Draft) -> None:
    """DoRA's magnitudes; of a fused projection those of the rows that are not adapted as well."""
    learned = draft.adapter.magnitudes
    for form in draft.forms if learned else ():
        key = f"{form.path}.lora_magnitude_vector"
        if isinstance(form, Projection):
            module = draft.base.modules[form.target]
            weight = layout_of(module).matrix(dense_weight(module)).cpu()
            first = learned[next(iter(form.places))]
            whole = torch.linalg.vector_norm(weight.to(first.dtype), dim=-1)
            for name, layout in form.places.items():
                whole[torch.tensor(layout.rows)] = learned[name]
            draft.tensors[key] = whole
        else:
            ((name, _),) = form.places.items()
            draft.tensors[key] = learned[name].reshape(form.magnitude())


def _biases(draft: _Draft) -> None:
    """Biases as they are by now; what a layer without a bias has gained is a bias of its B."""
    frozen = bias_parameters(draft.base.modules, ())
    owners = {f"{form.target}.bias": form for form in draft.forms if bias_keys(form)}
    gained: dict[str, Tensor] = {}
    for name, added in draft.adapter.biases.items():
        if name in frozen:
            there = absolute(frozen[name], added)
            draft.exact.keep("bias", name, added, change(frozen[name], there))
            draft.tensors[draft.paths.tensor(name)] = there
        elif name in owners:
            gained[name] = added
        else:
            draft.tensors[draft.paths.tensor(name)] = added
            draft.foreign = True
    if not gained:
        return
    draft.lora_bias = True
    for form in draft.forms:
        for key, shape in bias_keys(form).items():
            draft.tensors[f"{form.path}.{key}"] = torch.zeros(shape)
    for name, added in gained.items():
        form = owners[name]
        scale = draft.scales[form.target]
        bias = bias_within(added, scale)
        weight = dense_weight(draft.base.modules[form.target])
        draft.exact.keep("bias", name, added, added_by(bias, scale, weight))
        draft.tensors[f"{form.path}.lora_B.bias"] = bias


def _tokens(draft: _Draft) -> dict[str, list[int]]:
    """Rows of embeddings as they are by now; gives their ids by PEFT's name for the embedding."""
    base = draft.base
    found: dict[str, list[int]] = {}
    for name, rows in draft.adapter.tokens.items():
        frozen = frozen_rows(base.modules[name], rows.ids)
        there = absolute(frozen, rows.delta)
        draft.exact.keep("tokens", name, rows.delta, change(frozen, there))
        draft.tensors[tokens_key(name, draft.paths)] = there
        (end,) = saved_entries([name], base.names)
        found[end] = list(rows.ids)
        # PEFT puts the rows of these elsewhere as well, or nowhere
        twice = _saved(end, base.names) != [name]
        draft.foreign |= twice or (name in base.shared and name not in base.vocabulary)
        draft.foreign |= any(form.target == name for form in draft.forms)
    return found


def _notes(draft: _Draft, tied: Mapping[str, str]) -> Notes:
    adapter, names = draft.adapter, draft.base.names
    split = adapter.method.split
    fused = [form.target for form in draft.forms if isinstance(form, Projection)]
    ends = {name: saved_entries([name], names)[0] for name in adapter.tokens}
    order = dict.fromkeys([*bias_parameters(draft.base.modules, ()), *adapter.biases])
    return Notes(
        shares=draft.shares,
        split={name: split[key] for name in fused if (key := first_match(split, name)) is not None},
        own=tuple(form.target for form in draft.forms if isinstance(form, Plain)),
        tied=tied,
        biases=tuple(n for n in order if n in adapter.biases) or None,
        tokens={end: name for name, end in ends.items() if _saved(end, names) != [name]},
        freeze_A=adapter.method.freeze_A,
        dropout=adapter.method.dropout if _passive(draft.forms) else 0.0,
        slot=adapter.method.slot,
    )


def _saved(end: str, names: Sequence[str]) -> list[str]:
    """The modules that PEFT means by an entry for what trains beside LoRA."""
    return [name for name in names if name.endswith(end)]


def _passive(forms: list[Form]) -> bool:
    """Whether PEFT refuses any dropout."""
    return any(isinstance(form, Parameter) for form in forms)


def _config(
    draft: _Draft, tokens: Mapping[str, list[int]], tied: Mapping[str, str], revision: str | None
) -> dict[str, object]:
    adapter, base = draft.adapter, draft.base
    known = [form.target for form in draft.forms if not isinstance(form, Plain)]
    told = known or list(draft.ranks)
    r, rank_pattern = patterns({name: draft.ranks[name] for name in told})
    alpha, alpha_pattern = patterns({name: draft.alphas[name] for name in told})
    saved = saved_entries(adapter.modules, base.names)
    by_peft = bool(tied) and {*tied, *tied.values()} <= set(base.vocabulary)
    target_modules = _target_modules(draft, saved, base.vocabulary[1:] if by_peft else ())
    config: dict[str, object] = {
        "peft_type": OURS if draft.foreign else "LORA",
        "task_type": base.task_type,
        "base_model_name_or_path": base.name,
        "revision": revision,
        "r": r,
        "lora_alpha": _plain(alpha),
        "target_modules": target_modules if isinstance(target_modules, str) else [*target_modules],
        "exclude_modules": None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {key: _plain(value) for key, value in alpha_pattern.items()},
        "use_rslora": adapter.method.rank_stabilized,
        "use_dora": adapter.method.dora,
        "lora_dropout": 0.0 if _passive(draft.forms) else adapter.method.dropout,
        "bias": _bias(draft),
        "fan_in_fan_out": _all_turned(draft),
        "modules_to_save": [*saved] or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    further: dict[str, object] = {
        "target_parameters": _target_parameters(draft),
        "trainable_token_indices": dict(tokens),
        "ensure_weight_tying": by_peft,
        "lora_bias": draft.lora_bias,
    }
    return {**config, **{key: value for key, value in further.items() if value}}


def _target_modules(
    draft: _Draft, saved: tuple[str, ...], follow: Sequence[str]
) -> tuple[str, ...] | str:
    """The entries that mean the wrapped modules and no others; ``follow`` come along with a tie."""
    names = draft.base.names
    known = [f.target for f in draft.forms if not isinstance(f, Plain | Parameter)]
    wanted = [name for name in known if name not in follow]
    outside = [n for n in names if not within(n, draft.adapter.modules)]
    target_modules = entries(wanted, outside) if wanted else ()
    rule = Rule(target_modules, modules_to_save=saved)
    whole = [n for n in names if rule.saves(n)]
    lost = [
        shown(n)
        for n in names
        if rule.targets(n) != (n in wanted) or (n in wanted and within(n, whole))
    ]
    gather(
        UserError,
        f"PEFT's format cannot express this adapter: modules_to_save {list(saved)} also takes in, "
        "by PEFT's rule, modules that are adapted. Rename the module that trains whole, or do "
        "not adapt these",
        lost,
    )
    return target_modules


def _target_parameters(draft: _Draft) -> list[str]:
    """The entries that mean the adapted parameters and no others."""
    wanted = [form.target for form in draft.forms if isinstance(form, Parameter)]
    every = [
        f"{name}.{key}"
        for name, module in draft.base.modules.items()
        for key, _ in module.named_parameters(recurse=False)
    ]
    chosen = entries(wanted, every) if wanted else ()
    if isinstance(chosen, str):
        raise UserError(
            "PEFT's format cannot express this adapter: the name of an adapted parameter "
            f"({', '.join(shown(n) for n in wanted[:3])}) is the end of another's. Rename it."
        )
    return [*chosen]


def _bias(draft: _Draft) -> str:
    """PEFT's word for which biases of the base have changed."""
    adapter = draft.adapter
    if not set(adapter.biases) & set(bias_parameters(draft.base.modules, ())):
        return "none"
    wrapped = {f"{form.target}.bias" for form in draft.forms}
    everywhere = adapter.method.bias == "all" or not set(adapter.biases) <= wrapped
    return "all" if everywhere and adapter.method.bias != "adapted" else "lora_only"


def _all_turned(draft: _Draft) -> bool:
    """Whether all linear layers store their weight as (in, out)."""
    modules = [draft.base.modules[f.target] for f in draft.forms if f.target in draft.base.modules]
    linear = [m for m in modules if isinstance(m, nn.Linear) or is_conv1d(m)]
    return bool(linear) and all(is_conv1d(m) for m in linear)


def _plain(number: float) -> float | int:
    """16.0 as 16, which is how everybody writes alpha."""
    return int(number) if number == int(number) else number
