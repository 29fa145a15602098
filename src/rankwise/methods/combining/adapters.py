"""combine: several adapters as one, their updates joined and the error of every weight measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from rankwise.errors import UserError, gather
from rankwise.lowrank import Factors
from rankwise.methods.adapter import Adapter, Tokens
from rankwise.methods.combining.agreement import disagreements, kept_modules
from rankwise.methods.combining.sums import Combination, Concatenate, Distance
from rankwise.methods.lora import LoRA
from rankwise.methods.restate import exactly, restated

__all__ = ["Combined", "combine"]

_SUM = Concatenate()


@dataclass(frozen=True)
class Combined:
    """An adapter made of several, and what became of their updates on the way.

    Attributes:
        adapter: rankwise.attach(model, combined.adapter) puts it on a base.
        cuts: for each adapted name how far its update is from what the combination means, before
            the rank is cut.
        shifts: for each adapted name how far its update is from the plain sum Σ w_i δ_i.
    """

    adapter: Adapter
    cuts: Mapping[str, Distance]
    shifts: Mapping[str, Distance]

    @property
    def errors(self) -> dict[str, float]:
        """What cutting the rank lost of each adapted name: ‖T − δ‖ / ‖T‖, measured.

        T is Σ w_i δ_i for a sum, and what TIES, DARE or pruning make of the δ_i otherwise.
        """
        return {name: cut.error for name, cut in self.cuts.items()}

    @property
    def error(self) -> float:
        """The same over all adapted names, as if they were one long vector."""
        return Distance.over(self.cuts.values()).error

    @property
    def shift(self) -> float:
        """‖Σ w_i δ_i − δ‖ / ‖Σ w_i δ_i‖ over all adapted names; of a sum it is the error."""
        return Distance.over(self.shifts.values()).error


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    how: Combination = _SUM,
    *,
    head: int | None = None,
    names: Sequence[str] | None = None,
) -> Combined:
    """One adapter of several that were trained on the same base.

    Formula: δ = Σ w_i δ_i for each adapted name, joined as ``how`` says: :class:`Concatenate`
    (exact), :class:`SVD` (the best of a lower rank), :class:`TIES`, :class:`DARE` or
    :class:`Magnitude`. A name that an adapter does not have counts as δ_i = 0. Changes of biases
    and rows of tokens add up in the same way. A start (A0, B0) is part of its δ_i; the result has
    none and fits the untouched base.

    There is no average of A and B apart (PEFT's "linear"): Σ w_i B_i A_i is not a product of sums,
    and what that yields has little to do with it.

    Args:
        adapters: one or more; the weights they adapt must have the same shapes.
        weights: w_i, finite and not all 0, each 1 when not given; a negative one takes a task away.
        how: how the updates of one weight become one.
        head: where adapters have different modules that were trained whole, such as a head, which
            adapter's (counted from 0) are kept; those cannot be added up.
        names: what messages call the adapters; adapters[0], ... when not given.

    Raises:
        UserError: lists everything that keeps these adapters from being combined: a DoRA
            magnitude, other shapes, rival modules, weights that are none, numbers that are not
            finite.
    """
    amounts = _amounts(len(adapters), weights)
    words = [f"adapters[{i}]" for i in range(len(adapters))] if names is None else list(names)
    if len(words) != len(adapters):
        raise UserError(f"There are {len(words)} names for {len(adapters)} adapters.")
    called = list(zip(words, adapters, strict=True))
    gather(UserError, "These adapters cannot be combined", [*disagreements(called, head)])
    acting = [(w, a) for w, a in zip(amounts, adapters, strict=True) if w != 0]
    adapted = dict.fromkeys(name for _, adapter in acting for name in adapter.factors)
    joined = {name: how.join(_parts(name, acting), name) for name in adapted}
    modules, trained = kept_modules(adapters, head)
    tokens = _tokens(acting)
    factors = {name: each.factors for name, each in joined.items()}
    adapter = Adapter(
        method=_method(acting, factors, modules, tokens),
        factors=factors,
        modules=modules,
        trained=trained,
        biases=_biases(acting),
        tokens=tokens,
    )
    cuts = {name: each.cut for name, each in joined.items()}
    return Combined(adapter, cuts, {name: each.shift for name, each in joined.items()})


_Acting = Sequence[tuple[float, Adapter]]


def _amounts(count: int, weights: Sequence[float] | None) -> list[float]:
    """The weights, checked."""
    if count == 0:
        raise UserError("There is no adapter to combine.")
    if weights is None:
        return [1.0] * count
    wrong = [
        w
        for w in weights
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w)
    ]
    problems = [f"{w!r} is not a finite number." for w in wrong]
    if len(weights) != count:
        problems.append(f"there are {len(weights)} weights for {count} adapters.")
    if not wrong and not any(weights):
        problems.append("all are 0, which leaves nothing.")
    gather(UserError, "weights", problems)
    return [float(w) for w in weights]


def _parts(name: str, acting: _Acting) -> list[Factors]:
    """The updates of one name, their weights multiplied into the scale."""
    pairs = [(w, adapter.factors[name].pair()) for w, adapter in acting if name in adapter.factors]
    return [Factors(pair.A, pair.B, w * pair.scale) for w, pair in pairs]


def _biases(acting: _Acting) -> dict[str, Tensor]:
    """Σ w_i Δb_i."""
    names = dict.fromkeys(name for _, adapter in acting for name in adapter.biases)
    return {
        name: _sum([(w, a.biases[name]) for w, a in acting if name in a.biases]) for name in names
    }


def _tokens(acting: _Acting) -> dict[str, Tokens]:
    """Σ w_i times the rows of each id, an id without a row counting as zero."""
    names = dict.fromkeys(name for _, adapter in acting for name in adapter.tokens)
    found: dict[str, Tokens] = {}
    for name in names:
        each = [(w, a.tokens[name]) for w, a in acting if name in a.tokens]
        ids = tuple(dict.fromkeys(i for _, rows in each for i in rows.ids))
        place = {token: row for row, token in enumerate(ids)}
        spread: list[tuple[float, Tensor]] = []
        for w, rows in each:
            whole = rows.delta.new_zeros(len(ids), rows.delta.shape[1])
            whole[[place[token] for token in rows.ids]] = rows.delta
            spread.append((w, whole))
        found[name] = Tokens(ids, _sum(spread))
    return found


def _sum(weighted: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Summed in float64 and rounded once, to float32 at least."""
    dtype = reduce(torch.promote_types, (t.dtype for _, t in weighted), torch.float32)
    total = torch.zeros_like(weighted[0][1], dtype=torch.float64)
    for w, tensor in weighted:
        total += w * tensor.to(total)
    return total.to(dtype)


def _method(
    acting: _Acting,
    factors: Mapping[str, Factors],
    modules: Sequence[str],
    tokens: Mapping[str, Tokens],
) -> LoRA:
    """The method that means exactly these weights, modules and rows."""
    methods = [adapter.method for _, adapter in acting]
    trained = {method.bias for method in methods}
    bias = "all" if "all" in trained else "adapted"
    method = LoRA(
        bias="none" if trained == {"none"} else bias,
        trainable_tokens={exactly(name): rows.ids for name, rows in tokens.items()},
        split={key: split for method in methods for key, split in method.split.items()},
        tied=methods[0].tied,
        head="freeze",
        modules_to_save=tuple(exactly(name) for name in modules),
    )
    return restated(method, factors)
