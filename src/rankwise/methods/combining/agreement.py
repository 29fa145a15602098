"""Whether adapters can be combined: what must agree, what cannot be added, and whose head stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rankwise.methods.adapter import Adapter

__all__ = ["disagreements", "kept_modules"]

Called = Sequence[tuple[str, Adapter]]
"""Each adapter with what messages call it."""


def disagreements(called: Called, head: int | None) -> Iterator[str]:
    """Everything that keeps these adapters from being combined, one sentence each."""
    yield from _magnitudes(called)
    yield from _shapes(called)
    yield from _not_finite(called)
    yield from _overlaps(called)
    yield from _methods(called)
    misnamed = None if head is None else _misnamed(called, head)
    if misnamed is not None:
        yield misnamed
        return
    if head is None:
        yield from _rivals(called)
    yield from _whole_and_adapted(called, kept_modules([a for _, a in called], head)[0])


def kept_modules(
    adapters: Sequence[Adapter], head: int | None
) -> tuple[tuple[str, ...], Mapping[str, Tensor]]:
    """The modules trained whole that the result has, and their tensors.

    Those of the adapter that ``head`` counts; without it those of all, which then are no rivals.
    """
    if head is not None:
        return adapters[head].modules, adapters[head].trained
    modules = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
    trained: dict[str, Tensor] = {}
    for adapter in adapters:
        trained.update(adapter.trained)
    return tuple(modules), trained


def _magnitudes(called: Called) -> Iterator[str]:
    for who, adapter in called:
        names = list(adapter.magnitudes)
        if names:
            listed = ", ".join(f"'{name}'" for name in names[:3]) + (", ..." * (len(names) > 3))
            yield (
                f"{who} is DoRA ({len(names)} magnitudes: {listed}). A magnitude sets the length "
                "of the rows of W0 + δ, and lengths do not add up as updates do. Merge it into a "
                "copy of the base, or train it without dora."
            )


def _shapes(called: Called) -> Iterator[str]:
    kinds: tuple[tuple[str, Callable[[Adapter], Mapping[str, str]]], ...] = (
        ("", _mappings),
        ("the bias ", lambda a: {n: f"has {t.numel()} numbers" for n, t in a.biases.items()}),
        ("the token rows of ", _widths),
    )
    for what, shapes in kinds:
        first: dict[str, tuple[str, str]] = {}
        for who, adapter in called:
            for name, shape in shapes(adapter).items():
                other, told = first.setdefault(name, (who, shape))
                if told != shape:
                    yield (
                        f"{what}'{name}' {told} in {other} and {shape} in {who}; they were made "
                        "for different bases."
                    )


def _mappings(adapter: Adapter) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, f in adapter.factors.items():
        maps = f"maps {f.in_features} to {f.out_features}"
        found[name] = maps if f.bank is None else f"is a bank of {f.bank} that {maps}"
    return found


def _widths(adapter: Adapter) -> dict[str, str]:
    return {n: f"are of {t.delta.shape[-1]} numbers" for n, t in adapter.tokens.items()}


def _not_finite(called: Called) -> Iterator[str]:
    for who, adapter in called:
        held = {
            **{n: (f.A, f.B, f.A0, f.B0) for n, f in adapter.factors.items()},
            **{n: (t,) for n, t in adapter.biases.items()},
            **{n: (t.delta,) for n, t in adapter.tokens.items()},
        }
        for name, tensors in held.items():
            if not all(t is None or bool(torch.isfinite(t).all()) for t in tensors):
                yield f"'{name}' of {who} holds NaN or infinity; its training diverged."


def _overlaps(called: Called) -> Iterator[str]:
    """A weight that one adapts as a whole and another in its parts."""
    owner = {name: who for who, adapter in called for name in adapter.factors}
    for name, who in owner.items():
        whole = next((o for o in _above(name) if o in owner), None)
        if whole is not None:
            yield (
                f"'{whole}' is adapted as a whole in {owner[whole]} and in its part '{name}' in "
                f"{who}."
            )


def _methods(called: Called) -> Iterator[str]:
    """Options of the methods that say what a name means."""
    tied = {adapter.method.tied: who for who, adapter in called}
    if len(tied) > 1:
        yield (
            f"{tied[True]} puts its updates on tied modules as well (tied=True), and {tied[False]} "
            "does not."
        )
    first = {key: (who, s) for who, a in reversed(called) for key, s in a.method.split.items()}
    for who, adapter in called:
        for key, split in adapter.method.split.items():
            other, told = first[key]
            if told != split:
                yield f"'{key}' is split differently in {other} and {who}."


def _rivals(called: Called) -> Iterator[str]:
    """Modules that two adapters trained whole, and differently."""
    first: dict[str, int] = {}
    for i, (who, adapter) in enumerate(called):
        for name in adapter.modules:
            other, before = called[first.setdefault(name, i)]
            if not _equal(_state(before, name), _state(adapter, name)):
                yield _choose(f"'{name}'", other, who)
    for name, i in first.items():
        outer = next((o for o in _above(name) if first.get(o, i) != i), None)
        if outer is not None:
            yield _choose(
                f"'{outer}', which holds '{name}',", called[first[outer]][0], called[i][0]
            )


def _choose(what: str, one: str, other: str) -> str:
    return (
        f"{what} was trained whole in {one} and in {other}, with different results, which cannot "
        f"be added up. Say by head whose modules are kept: {one} or {other}."
    )


def _misnamed(called: Called, head: object) -> str | None:
    """Why this is not the number of an adapter with modules trained whole, or None."""
    if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < len(called):
        return f"head must be the number of an adapter, 0 to {len(called) - 1}, got {head!r}."
    who, adapter = called[head]
    if not adapter.modules:
        return f"head is to be that of {who}, which has no module that was trained whole."
    return None


def _whole_and_adapted(called: Called, modules: Iterable[str]) -> Iterator[str]:
    """Modules trained whole in which another adapter has updates."""
    whole = set(modules)
    for who, adapter in called:
        for name in dict.fromkeys((*adapter.factors, *adapter.biases, *adapter.tokens)):
            outer = next((o for o in (name, *_above(name)) if o in whole), None)
            if outer is not None:
                yield (
                    f"'{outer}' is kept as it was trained whole, and {who} has an update for "
                    f"'{name}', which would be lost."
                )


def _above(name: str) -> Iterator[str]:
    """``a.b.c`` gives ``a.b`` and ``a``."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _state(adapter: Adapter, module: str) -> dict[str, Tensor]:
    return {k: t for k, t in adapter.trained.items() if k.startswith(module + ".")}


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
