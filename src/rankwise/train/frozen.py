"""How a model runs while it trains: dropout, the kernels it is computed by, what it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from rankwise.attaching import attachments
from rankwise.layers import (
    Update,
    all_by_seed,
    optimize_frozen,
    pack,
    recompute_activations,
)
from rankwise.train.attention import products_up_to
from rankwise.train.reporter import Reporter

__all__ = ["Kernels", "choose_kernels", "recompute_frozen", "train_mode"]


@dataclass(frozen=True)
class Kernels:
    """The kernels that a run is computed by, where they are not those that torch takes by itself.

    Attributes:
        packed: names of the frozen layers whose weight is packed.
        seeded_dropout: whether modules of the base draw their dropout by seed, where it acts.
        attention_by_products: up to which length in tokens attention is computed by plain products.
    """

    packed: tuple[str, ...] = ()
    seeded_dropout: bool = False
    attention_by_products: int = 0

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Kernels:
        """Those that a manifest tells of."""
        hardware = manifest["hardware"]
        names = {field.name for field in fields(cls)}
        told: dict[str, Any] = {name: hardware[name] for name in names & hardware.keys()}
        told["packed"] = tuple(told.get("packed", ()))
        return cls(**told)

    def record(self) -> dict[str, Any]:
        """What a manifest says of them."""
        return {**asdict(self), "packed": list(self.packed)}


def train_mode(model: nn.Module, base_dropout: bool) -> None:
    """Put a model into training mode; without its base's dropout when that is not wanted.

    Then every module below it that does not train is in evaluation mode, but for blocks that
    gradient checkpointing runs again, as it looks at their mode: dropout that such a block computes
    by itself, as OPT's and BART's do, acts there. The dropout of low-rank updates and inside
    modules that train whole acts either way.
    """
    model.train()
    if base_dropout:
        return
    own = [m for record in attachments(model).values() for m in record.copies.values()]
    own += [m for m in model.modules() if isinstance(m, Update)]
    live = {id(model), *(id(inner) for module in own for inner in module.modules())}
    for module in model.modules():
        if id(module) not in live and not getattr(module, "gradient_checkpointing", False):
            module.training = False


def choose_kernels(
    model: nn.Module,
    lengths: Sequence[int],
    batch_size: int,
    before: Mapping[str, Any] | None,
    reporter: Reporter,
) -> Kernels:
    """Let a model compute by the kernels that a short measurement on this CPU says are faster.

    Args:
        lengths: of the training rows in tokens.
        batch_size: rows in a pass.
        before: the manifest of the run that goes on: the same kernels are taken, so that it goes
            on bit for bit.
        reporter: told what was chosen.
    """
    rows = max(1, round(batch_size * sum(lengths) / max(1, len(lengths))))
    if before is not None:
        return _as_before(model, rows, Kernels.of(before))
    if next(model.parameters()).device != torch.device("cpu"):
        return Kernels()
    done = optimize_frozen(model, rows)
    if done.packed:
        best = min(done.ratios.values())
        reporter.note(
            f"{len(done.packed)} frozen layers are packed ({done.bytes / 1e6:,.0f} MB more); "
            f"measured here, that takes down to {best:.2f} of the plain time."
        )
    longest = products_up_to(model, max(lengths, default=0))
    if longest:
        reporter.note(
            f"Attention of up to {longest} tokens is computed by plain products; measured here, "
            "that is faster than torch's fused kernel."
        )
    return Kernels(done.packed, bool(done.dropouts), longest)


def _as_before(model: nn.Module, rows: int, chosen: Kernels) -> Kernels:
    for name in chosen.packed:
        pack(model.get_submodule(name), rows)
    if chosen.seeded_dropout:
        all_by_seed(model)
    return chosen


def recompute_frozen(model: nn.Module, reporter: Reporter) -> None:
    """Let backward make cheap outputs again in place of keeping them; the reporter is told which.

    The numbers stay the same bit for bit, so that a run may go on with or without it.
    """
    done = recompute_activations(model)
    kinds = {"norms": done.norms, "activations": done.activations, "gated MLPs": done.gated}
    found = ", ".join(f"{kind} {len(names)}" for kind, names in kinds.items() if names)
    reporter.note(f"Run again in backward: {found or 'nothing, as no module qualifies'}.")
