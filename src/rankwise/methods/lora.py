"""LoRA: low-rank updates beside chosen layers, and the head that goes with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from rankwise.attaching import Placement, Plan
from rankwise.errors import UserError, gather, nearest
from rankwise.inits import Init, Kaiming
from rankwise.layers import Spec, shape_of, wrap
from rankwise.methods.head import (
    copies,
    describe_copies,
    extra_modules,
    tied_partners,
    untied_notes,
)
from rankwise.targets import (
    ALL_LINEAR,
    Head,
    Site,
    find_head,
    first_match,
    matches,
    select,
    sites,
)

__all__ = ["LoRA", "default_targets"]

# Query and value of attention, as the architectures of transformers name them; fused projections
# that hold query and value in one matrix come last. The first entry whose names all occur is taken.
_QUERY_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("SelfAttention.q", "SelfAttention.v"),
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
    init: Init = Kaiming()
    head: Literal["train", "freeze"] | None = None
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
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                yield f"{name} must be a whole number of 1 or more, got {r!r}."
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

    def spec(self, name: str) -> Spec:
        """What the layer of this name is asked to be, by r, alpha and their patterns."""
        r_key = first_match(self.rank_pattern, name)
        r = self.r if r_key is None else self.rank_pattern[r_key]
        a_key = first_match(self.alpha_pattern, name)
        default = 2.0 * r if self.alpha is None else self.alpha
        alpha = default if a_key is None else self.alpha_pattern[a_key]
        return Spec(r, float(alpha), self.rank_stabilized, self.dropout, self.init)

    def plan(self, model: nn.Module) -> Plan:
        """Decide what is adapted and what trains, touching nothing.

        Raises:
            UserError: a target, exclude, pattern or layer number without a match; a module that
                cannot be adapted; two targets that share one weight; an output layer about which
                nothing was said.
        """
        targets = default_targets(model) if self.target_modules is None else self.target_modules
        excluded = tuple(self.exclude_modules)
        if ALL_LINEAR in targets:  # which means all but what trains whole
            excluded += tuple(extra_modules(model, self.modules_to_save))
        chosen = select(model, tuple(targets), excluded, self.layers)
        names = [site.name for site in chosen]
        problems = [*self._unused_patterns(names), *self._bypassed(chosen)]
        problems.extend(_tied_twice(model, names))
        gather(UserError, "LoRA cannot be attached as asked", problems)
        copied = copies(model, self._trained_whole(model, names))
        notes = list(_tied_notes(model, names))
        if copied:
            notes.extend((describe_copies(copied), *untied_notes(model, copied)))
        notes.extend(_full_rank_notes(chosen, self))
        return Plan(
            method=self,
            placements=(*(_placement(site, self.spec(site.name)) for site in chosen), *copied),
            notes=tuple(notes),
        )

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

    def _bypassed(self, chosen: Sequence[Site]) -> Iterable[str]:
        if self.dropout == 0:
            return
        for site in chosen:
            if any(isinstance(parent, nn.MultiheadAttention) for parent, _ in site.owners):
                yield (
                    f"'{site.name}' belongs to an nn.MultiheadAttention, which reads its weight "
                    "and never runs it, so dropout on the LoRA branch cannot take effect there. "
                    "Use dropout=0, or put it in exclude_modules."
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
        if self.head == "train" and not head.names:
            raise UserError(
                f"head='train', but {type(model).__name__} has no output layer that Rankwise can "
                "find. Name the module in modules_to_save instead."
            )
        if self.head is not None:
            return self.head == "train"
        if not head.names or set(head.names) <= set(extra):
            return False
        if touched and head.kind == "classification":
            raise UserError(
                f"The targets mean '{touched[0]}' too, which is part of the output layer, so the "
                "output layer would stay as it is but for a low-rank update. Put it in "
                "exclude_modules and the output layer trains whole, or say LoRA(..., "
                "head='freeze') where it is pre-trained for this very task."
            )
        if touched:
            return False
        if head.kind == "output":
            raise UserError(
                f"The output layer '{head.names[0]}' would stay as it is, and nothing was said "
                "about it. Say LoRA(..., head='train') to train it and save it with the adapter, "
                "head='freeze' to leave it (right when it is pre-trained for this very task), or "
                "name it in target_modules."
            )
        return head.kind == "classification"


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """The names of the query and value projections of attention in this model.

    Raises:
        UserError: no known naming occurs; the message lists what could be named.
    """
    names = list(sites(model))
    for entry in _QUERY_VALUE:
        if all(any(matches(part, name) for name in names) for part in entry):
            return entry
    linear = [n for n, s in sites(model).items() if isinstance(s.module, nn.Linear)]
    ends = list(dict.fromkeys(n.rpartition(".")[2] for n in linear if not n[-1].isdigit()))
    listed = f" Its linear layers end in: {', '.join(ends[:12])}." if ends else ""
    raise UserError(
        f"{type(model).__name__} has no attention query and value of a known name, so "
        f"target_modules must be given: names of layers, or 'all-linear'.{listed}"
    )


def _placement(site: Site, spec: Spec) -> Placement:
    return Placement(site, lambda module: wrap(module, spec))


def _tied_twice(model: nn.Module, names: Sequence[str]) -> Iterable[str]:
    for name, others in tied_partners(model, names):
        for other in others:
            if other in names and names.index(name) < names.index(other):
                yield (
                    f"'{name}' and '{other}' share one weight, and both are targets: the weight "
                    "would be adapted twice. Put one of them in exclude_modules."
                )


def _tied_notes(model: nn.Module, names: Sequence[str]) -> Iterable[str]:
    for name, others in tied_partners(model, names):
        yield (
            f"'{name}' shares its weight with {', '.join(others)}: the update applies to '{name}' "
            "only, and merging gives it a weight of its own."
        )


def _full_rank_notes(chosen: Sequence[Site], method: LoRA) -> Iterable[str]:
    full = [s for s in chosen if method.spec(s.name).r >= min(shape_of(s.module))]
    if full:
        yield (
            f"r reaches the full rank of {len(full)} adapted layer(s), the first being "
            f"'{full[0].name}' {shape_of(full[0].module)}; a smaller r loses nothing."
        )
