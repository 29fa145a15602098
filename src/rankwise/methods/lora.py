"""LoRA: low-rank updates beside chosen layers, and the head that goes with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from rankwise.attaching import Addition, Plan
from rankwise.errors import UserError, gather, nearest
from rankwise.inits import Fitted, Init, Kaiming, LoftQ, Start
from rankwise.layers import Spec, Split, is_wrapped, rounds_inputs
from rankwise.lowrank import rank_problems
from rankwise.methods.additions import (
    add_bias,
    add_low_rank,
    add_shared,
    add_tokens,
    bias_sites,
    fitted_starts,
    tied_sites,
    token_sites,
)
from rankwise.methods.head import (
    HeadChoice,
    copies,
    describe_copies,
    extra_modules,
    head_trains,
    untied_notes,
)
from rankwise.methods.notes import (
    left_out_notes,
    tied_notes,
    tied_twice,
    undropped_notes,
    unmergeable_notes,
)
from rankwise.targets import (
    ALL_LINEAR,
    Head,
    Target,
    find_head,
    first_match,
    matches,
    select,
    sites,
    targets_of,
)

__all__ = ["LoRA", "default_targets"]

# Query and value of attention, as the architectures of transformers name them; fused projections
# that hold query and value in one matrix come last. The first entry whose names all occur is taken.
_QUERY_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    (r".*Attention\.q", r".*Attention\.v"),
    ("attn.q", "attn.v"),
    ("to_q", "to_v"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("qkv",),
)

_NAME_LISTS = ("target_modules", "exclude_modules", "modules_to_save")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation: y = W0 x + s · B A x on chosen layers, W0 frozen.

    Attributes:
        r: rank of the update, 1 or more.
        alpha: α in s = α/r; None means 2·r of each layer, so that s stays 2 whatever the rank
            (with rank_stabilized s would be 2√r, so give alpha there).
        target_modules: names (a module's own, or the end of its dotted name), regular expressions
            that match the whole name, or ``"all-linear"``. None means the query and value
            projections of attention (Hu et al. 2021, section 4.2), where the architecture is one
            whose names are known.
        exclude_modules: the same language; wins over target_modules and covers what lies inside.
        layers: numbers of the blocks to adapt, from 0; None means all.
        rank_stabilized: s = α/√r (arXiv 2312.03732) in place of α/r.
        rank_pattern: r for some modules, by the same names or patterns; the first match counts.
        alpha_pattern: α for some modules.
        dropout: on the input of the LoRA branch during training, in [0, 1).
        init: how A and B start.
        dora: a magnitude of each output trains beside the direction (DoRA, arXiv 2402.09353).
        freeze_A: A keeps its start and B trains alone (LoRA-FA, arXiv 2308.03303); backward then
            keeps N · r numbers of a layer and not its input.
        bias: which biases train as well: "none", those of the "adapted" modules, or "all" of the
            model that do not train with a whole module anyway.
        trainable_tokens: rows of embeddings that train, by the embedding's name: the ids of new
            tokens. Where the output layer is tied to the embedding it uses the same rows.
        split: the parts of fused projections, by name or pattern: with
            ``{"c_attn": Split(("q_proj", "k_proj", "v_proj"))}`` the target ``c_attn.q_proj``
            means the query alone. nn.MultiheadAttention needs none.
        tied: where a target shares its weight with another module, the update is put on both, so
            that they stay tied. Without it the update is on the target only.
        slot: room for this rank in every adapted layer, filled up with zeros, so that
            :func:`rankwise.hotswap` can put other adapters in its place without another module or
            another shape, and a compiled model need not be compiled again. None for no room.
        head: what becomes of the output layer. "train": a copy of it trains and is saved with the
            adapter. "freeze": it stays as it is. None: a classification head of transformers
            trains, a language model's output stays frozen, and for any other model whose output
            layer is not adapted itself it is an error not to say.
        modules_to_save: further modules that train whole and are saved.

    Raises:
        UserError: lists every value that makes no sense.

    Source: Hu et al. 2021, arXiv 2106.09685; docs/math.md (1), (2).
    """

    r: int = 8
    alpha: float | None = None
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] = ()
    layers: Sequence[int] | None = None
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    dropout: float = 0.0
    init: Init | Fitted = Kaiming()
    dora: bool = False
    freeze_A: bool = False
    bias: Literal["none", "adapted", "all"] = "none"
    trainable_tokens: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    split: Mapping[str, Split] = field(default_factory=dict[str, Split])
    tied: bool = False
    slot: int | None = None
    head: HeadChoice = None
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in _NAME_LISTS:
            value: Sequence[str] | str | None = getattr(self, name)
            if value is not None:
                whole = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, name, whole)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        gather(UserError, "LoRA", [*self._number_problems(), *self._word_problems()])

    def _number_problems(self) -> Iterable[str]:
        ranks = {"r": self.r, **{f"rank_pattern['{k}']": v for k, v in self.rank_pattern.items()}}
        for name, r in ranks.items():
            yield from rank_problems(name, r)
        alphas = {f"alpha_pattern['{k}']": v for k, v in self.alpha_pattern.items()}
        if self.alpha is not None:
            alphas["alpha"] = self.alpha
        for name, alpha in alphas.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
                yield f"{name} must be a number, got {alpha!r}."
            elif not math.isfinite(alpha) or alpha <= 0:
                yield f"{name} must be a finite number above 0, got {alpha!r}."
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            yield f"dropout must be a number of at least 0 and below 1, got {self.dropout!r}."

    def _word_problems(self) -> Iterable[str]:
        for name in _NAME_LISTS:
            words: Sequence[str] = getattr(self, name) or ()
            yield from (f"{name} holds {w!r}, not a name." for w in words if not isinstance(w, str))
        if self.head not in (None, "train", "freeze"):
            yield f"head must be 'train', 'freeze' or None, got {self.head!r}."
        if self.bias not in ("none", "adapted", "all"):
            yield f"bias must be 'none', 'adapted' or 'all', got {self.bias!r}."
        for pattern, split in self.split.items():
            if not isinstance(split, Split):
                yield f"split['{pattern}'] must be a rankwise.Split, got {split!r}."
        if self.slot is not None:
            yield from self._slot_problems(self.slot)

    def _slot_problems(self, slot: int) -> Iterable[str]:
        wrong = [*rank_problems("slot", slot)]
        yield from wrong
        if not wrong and (most := max([self.r, *self.rank_pattern.values()])) > slot:
            yield f"slot={slot} has no room for rank {most}."
        clashes = {"dora": self.dora, "tied": self.tied, "freeze_A": self.freeze_A}
        for name in (n for n, on in clashes.items() if on):
            yield f"slot holds adapters of A and B alone; {name} cannot be used with it."

    def spec(self, name: str) -> Spec:
        """What the layer of this name is asked to be, by r, alpha and their patterns."""
        r_key = first_match(self.rank_pattern, name)
        r = self.r if r_key is None else self.rank_pattern[r_key]
        a_key = first_match(self.alpha_pattern, name)
        default = 2.0 * r if self.alpha is None else self.alpha
        alpha = default if a_key is None else self.alpha_pattern[a_key]
        return Spec(
            r,
            float(alpha),
            self.rank_stabilized,
            self.dropout,
            self.init,
            self.dora,
            self.freeze_A,
            self.slot,
        )

    def plan(self, model: nn.Module) -> Plan:
        """Decide what is adapted and what trains, touching nothing.

        A start that looks at the running model (EVA, LoRA-GA) runs it here.

        Raises:
            UserError: a target, exclude, pattern or layer number without a match; a module that
                cannot be adapted, or not in the way asked for; two targets that share one weight;
                an output layer about which nothing was said.
        """
        targets = default_targets(model) if self.target_modules is None else self.target_modules
        excluded = tuple(self.exclude_modules)
        if ALL_LINEAR in targets:  # which means all but what trains whole
            excluded += tuple(extra_modules(model, self.modules_to_save))
        chosen = select(model, tuple(targets), excluded, self.layers, self.split)
        names = [target.name for target in chosen]
        problems = [*self._unused_patterns(names), *self._clashes(chosen)]
        problems.extend(() if self.tied else tied_twice(model, chosen))
        gather(UserError, "LoRA cannot be attached as asked", problems)
        whole = self._trained_whole(model, names)
        copied = copies(model, whole)
        method, additions = self._updates(model, chosen)
        additions.extend(self._further(model, chosen, whole))
        notes = [] if self.tied else list(tied_notes(model, chosen))
        if ALL_LINEAR in targets:
            notes.extend(left_out_notes(model, chosen, excluded, self.layers))
        if copied:
            notes.extend((describe_copies(copied), *untied_notes(model, copied)))
        if self.dropout > 0:
            notes.extend(undropped_notes(chosen))
        notes.extend((*unmergeable_notes(chosen), *method._sizes(chosen)))
        if isinstance(method.init, LoftQ) or not isinstance(method.init, Init):
            # what it looked at, batches or a whole model, is not held as long as the adapter
            method = replace(method, init=Kaiming())
        return Plan(method, tuple(additions), copied, notes=tuple(notes))

    def _updates(self, model: nn.Module, chosen: Sequence[Target]) -> tuple[LoRA, list[Addition]]:
        """The low-rank updates, and the method with the ranks that its start chose."""
        method = self
        starts: Mapping[str, Start] = {}
        if not isinstance(self.init, Init):
            starts = fitted_starts(model, chosen, self.spec, self.init)
            chosen = [t for t in chosen if t.name in starts]
            ranks = {t.name: starts[t.name].A.shape[-2] for t in chosen}
            changed = {n: r for n, r in ranks.items() if r != self.spec(n).r}
            if changed:  # and α with them, so that each layer keeps its s
                alphas = {n: self._alpha_for(n, r) for n, r in changed.items()}
                method = replace(
                    self,
                    rank_pattern={**changed, **self.rank_pattern},
                    alpha_pattern={**alphas, **self.alpha_pattern},
                )
        done: set[str] = set()
        additions: list[Addition] = []
        for target in chosen:
            if target.name in done:
                continue
            spec = method.spec(target.name)
            additions.append(add_low_rank(target, spec, starts.get(target.name)))
            for partner in tied_sites(model, target.site.name) if self.tied else ():
                additions.append(add_shared(target.name, partner))
                done.add(partner.name)
        return method, additions

    def _alpha_for(self, name: str, r: int) -> float:
        """The α that gives a layer the s it was asked for at another rank."""
        return self.spec(name).scale * (math.sqrt(r) if self.rank_stabilized else r)

    def _further(
        self, model: nn.Module, chosen: Sequence[Target], whole: Sequence[str]
    ) -> Iterable[Addition]:
        """Trained biases and token rows."""
        if self.bias != "none":
            found = list(bias_sites(model, chosen, self.bias, whole))
            if not found:
                owners = "adapted module" if self.bias == "adapted" else "frozen module"
                raise UserError(f"bias='{self.bias}', but no {owners} has a bias. Use bias='none'.")
            for site, parameter, shape in found:
                yield add_bias(site, parameter, shape)
        for site, ids in token_sites(model, self.trainable_tokens):
            rows = add_tokens(site, ids)
            yield rows
            for partner in tied_sites(model, site.name):
                yield add_shared(rows.name, partner, "tokens")

    def _unused_patterns(self, names: Sequence[str]) -> Iterable[str]:
        options = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        for option, patterns in options.items():
            for pattern in patterns:
                if not any(matches(pattern, name) for name in names):
                    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
                    yield (
                        f"{option}: '{pattern}' matches no adapted module."
                        f"{nearest(pattern, [*ends, *names])}"
                    )

    def _clashes(self, chosen: Sequence[Target]) -> Iterable[str]:
        """What these targets cannot do of what is asked."""
        for target in chosen:
            module, name = target.site.base, target.name
            if self.dropout > 0 and (
                (attention := _in_attention(target)) or not is_wrapped(module)
            ):
                owner = "an nn.MultiheadAttention" if attention else f"a {type(module).__name__}"
                yield (
                    f"'{name}' belongs to {owner}, which reads its weight and never runs it, so "
                    "dropout on the LoRA branch cannot take effect there. Use dropout=0, or put "
                    "it in exclude_modules."
                )
            if self.freeze_A and isinstance(module, nn.Embedding):
                yield (
                    f"'{name}' is an Embedding, whose A starts at zero: with freeze_A nothing "
                    "would ever change. Put it in exclude_modules."
                )
            if self.dora and rounds_inputs(module):
                yield (
                    f"'{name}' rounds its inputs to 8 bits, and DoRA divides by the norms of a "
                    "weight that is not the one it multiplies with. Load it in 4 bits, or use "
                    "dora=False."
                )
            if self.slot is not None and target.layout.bank:
                yield f"'{name}' is a bank of weights, which has no slots; use slot=None."
            unshared = "DoRA" if self.dora else "a part of it" if target.layout.part else ""
            if self.tied and unshared and tied_sites(target.site.root, target.site.name):
                yield (
                    f"'{name}' is tied to another module, and {unshared} cannot be shared. Use "
                    "tied=False."
                )

    def _sizes(self, chosen: Sequence[Target]) -> Iterable[str]:
        sizes = [(t, (t.layout.out_features, t.layout.in_features)) for t in chosen]
        full = [(t, size) for t, size in sizes if self.spec(t.name).r >= min(size)]
        if full:
            yield (
                f"r reaches the full rank of {len(full)} adapted layer(s), the first being "
                f"'{full[0][0].name}' {full[0][1]}; a smaller r loses nothing."
            )

    def _trained_whole(self, model: nn.Module, adapted: Sequence[str]) -> list[str]:
        head = find_head(model)
        touched = [name for name in adapted if head.holds(name)]
        extra = extra_modules(model, self.modules_to_save)
        trains = self._head_trains(model, head, touched, extra)
        whole = [*(head.names if trains else ()), *extra]
        for name in whole:
            inside = [a for a in adapted if a == name or a.startswith(name + ".")]
            if inside:
                raise UserError(
                    f"'{name}' is to be trained whole, and '{inside[0]}' in it is a target as "
                    "well. Put it in exclude_modules, or do not train the whole module."
                )
        return list(dict.fromkeys(whole))

    def _head_trains(
        self, model: nn.Module, head: Head, touched: Sequence[str], extra: Sequence[str]
    ) -> bool:
        unsaid = self.head is None and head.names and not set(head.names) <= set(extra)
        if not touched or not unsaid:
            further = ", or name it in target_modules"
            return head_trains(model, head, self.head, extra, "LoRA", further)
        if head.kind == "classification":
            raise UserError(
                f"The targets mean '{touched[0]}' too, which is part of the output layer, so the "
                "output layer would stay as it is but for a low-rank update. Put it in "
                "exclude_modules and the output layer trains whole, or say LoRA(..., "
                "head='freeze') where it is pre-trained for this very task."
            )
        return False


def _in_attention(target: Target) -> bool:
    owners = (target.site.base, *(parent for parent, _ in target.site.owners()))
    return any(isinstance(owner, nn.MultiheadAttention) for owner in owners)


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """The names of the query and value projections of attention in this model.

    Raises:
        UserError: no known naming occurs; the message lists what could be named.
    """
    names = list(dict.fromkeys([*sites(model), *targets_of(model)]))
    for entry in _QUERY_VALUE:
        if all(any(matches(part, name) for name in names) for part in entry):
            return entry
    linear = [n for n, s in sites(model).items() if isinstance(s.base, nn.Linear)]
    ends = list(dict.fromkeys(n.rpartition(".")[2] for n in linear if not n[-1].isdigit()))
    listed = f" Its linear layers end in: {', '.join(ends[:12])}." if ends else ""
    raise UserError(
        f"{type(model).__name__} has no attention query and value of a known name, so "
        f"target_modules must be given: names of layers, or 'all-linear'.{listed}"
    )
