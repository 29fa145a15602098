"""The neutral adapter: one method's learned tensors, taken from a model or put on one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from rankwise.attaching import (
    Addition,
    Placement,
    Plan,
    attachment,
    low_rank_updates,
    trained_copies,
    unmerged,
    updates_of,
)
from rankwise.errors import ArtifactError, UserError, gather, nearest
from rankwise.layers import Offset, Spec, TokenRows, refusal
from rankwise.lowrank import Factors
from rankwise.methods.additions import (
    TOKENS,
    add_bias,
    add_low_rank,
    add_shared,
    add_tokens,
    tied_sites,
)
from rankwise.methods.head import describe_copies, outermost
from rankwise.methods.lora import LoRA
from rankwise.targets import Site, Target, sites, targets_of

__all__ = ["Adapter", "Tokens", "adapter_of"]


@dataclass(frozen=True)
class Tokens:
    """Trained rows of an embedding.

    Attributes:
        ids: of the rows, n different ones.
        delta: (n, dim), what is added to each.
    """

    ids: tuple[int, ...]
    delta: Tensor


@dataclass(frozen=True)
class Adapter:
    """What was learned, apart from any model: the value that files are read into and written from.

    It is a method itself: ``rankwise.attach(model, adapter)`` puts it on a base.

    Attributes:
        method: how it was asked for; ``method.target_modules`` is exact for the adapted names.
        factors: A (r, in), B (out, r), s and the start of each adapted weight, by its name.
        modules: names of the modules that trained whole, such as the head.
        trained: their tensors, by full parameter or buffer name.
        magnitudes: DoRA's m (out,) of each adapted weight, by its name.
        biases: what is added to biases (out,), by the bias's full parameter name.
        tokens: trained rows of embeddings, by the embedding's name.
        lent: whether a model that this is put on takes the tensors of ``factors`` themselves,
            where it would train copies of them else.
    """

    method: LoRA
    factors: Mapping[str, Factors]
    modules: tuple[str, ...] = ()
    trained: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    tokens: Mapping[str, Tokens] = field(default_factory=dict[str, Tokens])
    lent: bool = False

    def plan(self, model: nn.Module) -> Plan:
        """Place every tensor on this model, or say all that is wrong.

        Raises:
            ArtifactError: a module is missing or has another shape, or a trained tensor does not
                fit: the adapter was made for another base.
        """
        table = sites(model)
        weights = targets_of(model, self.method.split, table)
        problems = [p for name in self.factors if (p := self._misfit(name, weights, table))]
        problems.extend(p for name in self.modules if (p := self._module_misfit(name, table)))
        problems.extend(self._strays(table))
        gather(ArtifactError, "The adapter does not fit this model", problems)
        copied = tuple(Placement(table[n], self._trained_copy(n)) for n in outermost(self.modules))
        return Plan(
            method=self.method,
            additions=tuple(self._additions(model, table, weights)),
            placements=copied,
            notes=(describe_copies(copied),) if copied else (),
        )

    def _additions(
        self, model: nn.Module, table: Mapping[str, Site], weights: Mapping[str, Target]
    ) -> Iterator[Addition]:
        for name, factors in self.factors.items():
            target, spec, m = weights[name], self.method.spec(name), self.magnitudes.get(name)
            yield add_low_rank(target, spec, factors=factors, magnitude=m, lent=self.lent)
            if self.method.tied:
                for partner in tied_sites(model, target.site.name):
                    yield add_shared(name, partner)
        for name, change in self.biases.items():
            owner, _, parameter = name.rpartition(".")
            yield add_bias(table[owner], parameter, tuple(change.shape), change)
        for name, rows in self.tokens.items():
            tokens = add_tokens(table[name], rows.ids, rows.delta)
            yield tokens
            for partner in tied_sites(model, name):
                yield add_shared(tokens.name, partner, TOKENS)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        prefix = name + "."
        every = self.trained
        return {k.removeprefix(prefix): t for k, t in every.items() if k.startswith(prefix)}

    def _trained_copy(self, name: str) -> Callable[[nn.Module], nn.Module]:
        tensors = self._tensors(name)

        def build(module: nn.Module) -> nn.Module:
            fresh = copy.deepcopy(module)
            fresh.load_state_dict(tensors)
            return fresh

        return build

    def _misfit(
        self, name: str, weights: Mapping[str, Target], table: Mapping[str, Site]
    ) -> str | None:
        if name not in weights and name in table:
            return f"'{name}' cannot be adapted: {refusal(table[name].base)}."
        if name not in weights:
            return f"the model has no module '{name}'.{nearest(name, weights)}"
        factors, spec = self.factors[name], self.method.spec(name)
        if factors.r != spec.r or not math.isclose(factors.scale, spec.scale):
            return (
                f"'{name}' has factors of rank {factors.r} with scale {factors.scale:g}, and its "
                f"method asks for rank {spec.r} with scale {spec.scale:g}."
            )
        if self.method.dora != (name in self.magnitudes):
            has = "no" if self.method.dora else "a"
            return f"'{name}' has {has} magnitude, and the method says otherwise."
        layout = weights[name].layout
        reason = refusal(weights[name].site.base, layout)
        if reason is not None:
            return f"'{name}' cannot be adapted: {reason}."
        have = (layout.experts, layout.out_features, layout.in_features)
        want = (factors.bank, factors.out_features, factors.in_features)
        if have == want:
            return None
        return f"'{name}' {_mapping(*have)} in the model and {_mapping(*want)} in the adapter."

    def _module_misfit(self, name: str, table: Mapping[str, Site]) -> str | None:
        if name not in table:
            return f"the model has no module '{name}'.{nearest(name, table)}"
        wanted = {k: tuple(t.shape) for k, t in table[name].base.state_dict().items()}
        found = {k: tuple(t.shape) for k, t in self._tensors(name).items()}
        if wanted == found:
            return None
        return f"module '{name}' holds {wanted} in the model and {found} in the adapter."

    def _strays(self, table: Mapping[str, Site]) -> Iterator[str]:
        """Biases and token rows without a place."""
        for name, change in self.biases.items():
            owner, _, parameter = name.rpartition(".")
            if owner not in table:
                hint = nearest(owner, table)
                yield f"the model has no module '{owner}' for the bias '{name}'.{hint}"
                continue
            there = dict(table[owner].base.named_parameters(recurse=False)).get(parameter)
            if there is not None and there.shape != change.shape:
                have, want = tuple(there.shape), tuple(change.shape)
                yield f"'{name}' is {have} in the model and {want} in the adapter."
        for name, rows in self.tokens.items():
            module = table[name].base if name in table else None
            if not isinstance(module, nn.Embedding):
                yield f"the model has no embedding '{name}' for the trained tokens."
            elif rows.delta.shape[-1] != module.embedding_dim:
                have, want = module.embedding_dim, rows.delta.shape[-1]
                yield f"'{name}' has rows of {have} numbers, and the trained tokens of {want}."


def adapter_of(model: nn.Module, name: str | None = None) -> Adapter:
    """Take the learned tensors of an adapter off a model, as copies on the CPU; it keeps its own.

    Without a name, of the only adapter.

    Raises:
        UserError: the model carries no LoRA adapter, or it is merged.
    """
    record = attachment(model, name)
    if not isinstance(record.method, LoRA):
        raise UserError(f"{type(record.method).__name__} has no low-rank factors to take.")
    unmerged(model)
    updates = updates_of(model, record.name)
    low = low_rank_updates(model, record.name)
    copies = trained_copies(model, record.name)
    return Adapter(
        method=record.method,
        factors={n: _factors(low[n].factors(), record.method.spec(n)) for n in record.adapted},
        modules=tuple(copies),
        trained={
            f"{n}.{key}": _copy(tensor)
            for n, module in copies.items()
            for key, tensor in module.state_dict().items()
        },
        magnitudes={n: _copy(u.magnitude) for n, u in low.items() if u.magnitude is not None},
        biases={n: _copy(u.offset) for n, u in updates.items() if isinstance(u, Offset)},
        tokens={
            n.removesuffix(f".{TOKENS}"): Tokens(tuple(u.ids.tolist()), _copy(u.token_delta))
            for n, u in updates.items()
            if isinstance(u, TokenRows)
        },
    )


def _factors(live: Factors, spec: Spec) -> Factors:
    """Copies of live factors; of a slot the ranks in use, and the scale as it was before it was
    put into a tensor of float32.
    """
    r, A0, B0 = spec.r, live.A0, live.B0
    started = A0 is not None and bool(A0.any())
    return Factors(
        _copy(live.A[..., :r, :]),
        _copy(live.B[..., :r]),
        spec.scale,
        _copy(A0[..., :r, :]) if A0 is not None and started else None,
        _copy(B0[..., :r]) if B0 is not None and started else None,
    )


def _mapping(experts: int | None, out_features: int, in_features: int) -> str:
    bank = f"is a bank of {experts} weights that map" if experts is not None else "maps"
    return f"{bank} {in_features} to {out_features}"


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
