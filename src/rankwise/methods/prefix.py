"""Prefix tuning: trained keys and values in front of those of every attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.attaching import Addition, Plan
from rankwise.errors import UserError, gather
from rankwise.layers import (
    FreePrefix,
    GrownPrefix,
    LoRALayer,
    Prefix,
    Switch,
    Trunk,
    Update,
    wide_dtype,
)
from rankwise.methods.attention import attention_sites, heads_of, prefixed, unfit
from rankwise.methods.head import HeadChoice, describe_copies, trained_whole, untied_notes
from rankwise.targets import Site

__all__ = ["PrefixTuning"]

STD = 0.02


@dataclass(frozen=True)
class PrefixTuning:
    """Train L keys and values that every query of every attention sees before the tokens' own.

    For models of transformers that ask its registry of attention functions for theirs, which most
    do, computed with "sdpa" or "eager". Encoder, decoder and cross attention each have a prefix.
    The positions of the tokens are not moved, so a model takes inputs as long as before.

    Step 0 is not the base's function: whatever the prefix is, it takes its share of each softmax.
    It is the same for the same seed.

    Attributes:
        length: L, the trained positions in each attention.
        hidden: None, and the keys and values are the parameters; or the width of the network that
            they grow from during training, tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂, with all but W₂ and b₂ shared
            by the layers. Li and Liang trained with 512 and found it steadier than free
            parameters. What is saved are the keys and values, as they did.
        head: see :data:`rankwise.methods.head.HeadChoice`.
        modules_to_save: further modules that train whole and are saved.

    Raises:
        UserError: lists every value that makes no sense.

    Source: Li and Liang 2021, arXiv 2101.00190, sections 4 and 4.3; docs/math.md (21).
    """

    length: int = 16
    hidden: int | None = None
    head: HeadChoice = None
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        values = {"length": self.length, "hidden": 1 if self.hidden is None else self.hidden}
        wrong = [
            f"{name} must be a whole number of 1 or more, got {value!r}."
            for name, value in values.items()
            if not isinstance(value, int) or value < 1
        ]
        gather(UserError, "PrefixTuning", wrong)

    def plan(self, model: nn.Module) -> Plan:
        """A prefix for every attention, and a trained copy of the head.

        Raises:
            UserError: the model's attention cannot have one, or see
                :func:`rankwise.methods.head.trained_whole`.
        """
        found = list(attention_sites(model))
        if not found:
            raise UserError(
                f"{type(model).__name__} has no attention that a prefix can be put before: none "
                "asks transformers' registry of attention functions (ALL_ATTENTION_FUNCTIONS) for "
                "its own. DeBERTa, BLOOM, Falcon, MPT and GPT-J are among those that compute "
                "attention themselves. Use LoRA."
            )
        reasons = Counter(reason for site in found if (reason := unfit(site)) is not None)
        first = {unfit(site): site.name for site in reversed(found)}
        problems = [f"'{first[r]}' ({n} such): {r}." for r, n in reasons.items()]
        gather(UserError, "A prefix cannot be put before the attention of this model", problems)
        copied = trained_whole(model, self.head, self.modules_to_save, type(self).__name__)
        notes = (describe_copies(copied), *untied_notes(model, copied)) if copied else ()
        return Plan(
            self,
            additions=tuple(self._addition(site, found[0]) for site in found),
            placements=copied,
            notes=notes,
        )

    def _addition(self, site: Site, first: Site) -> Addition:
        def make(layer: LoRALayer, switch: Switch, made: Mapping[str, Update]) -> Prefix:
            vars(layer)["config"] = prefixed(vars(layer)["config"])
            shape, like = heads_of(site.base), _like(site)
            assert shape is not None  # as plan has seen to
            if self.hidden is None:
                return _free(shape, self.length, like, switch)
            if site is first:
                trunk = Trunk(self.length, shape[0] * shape[1], self.hidden, like)
                return GrownPrefix(shape, trunk, switch, first=True)
            holder = made[first.name]
            assert isinstance(holder, GrownPrefix)
            return GrownPrefix(shape, holder.trunk, switch, first=False)

        return Addition(site, None, site.name, make)


def _free(shape: tuple[int, int], length: int, like: Tensor, switch: Switch) -> FreePrefix:
    """Keys and values of N(0, STD²)."""
    heads, size = shape
    keys, values = like.new_empty(heads, length, size), like.new_empty(heads, length, size)
    for drawn in (keys, values):
        drawn.normal_(0.0, STD)
    return FreePrefix(keys, values, switch)


def _like(site: Site) -> Tensor:
    """An empty tensor of the dtype and on the device of what trains beside this attention."""
    stored = next(iter((*site.base.parameters(), *site.root.parameters())))
    return torch.empty(0, dtype=wide_dtype(stored), device=stored.device)
