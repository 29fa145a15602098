"""How the frozen part of a model runs while the rest trains: dropout, kernels, what it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankwise.attaching import attachments
from rankwise.layers import Update, optimize_frozen, pack, recompute_activations
from rankwise.train.reporter import Reporter

__all__ = ["pack_frozen", "recompute_frozen", "train_mode"]


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


def pack_frozen(
    model: nn.Module,
    lengths: Sequence[int],
    batch_size: int,
    before: Mapping[str, Any] | None,
    reporter: Reporter,
) -> tuple[str, ...]:
    """Pack frozen weights where a measurement on this CPU says that it is faster.

    Args:
        lengths: of the training rows in tokens.
        batch_size: rows in a pass.
        before: the manifest of the run that goes on: the same layers are packed, so that it goes
            on bit for bit.
        reporter: told what was packed.

    Returns:
        the names of the packed layers.
    """
    rows = max(1, round(batch_size * sum(lengths) / max(1, len(lengths))))
    if before is not None:
        names: tuple[str, ...] = tuple(before["hardware"].get("packed", ()))
        for name in names:
            pack(model.get_submodule(name), rows)
        return names
    if next(model.parameters()).device != torch.device("cpu"):
        return ()
    done = optimize_frozen(model, rows)
    if done.packed:
        best = min(done.ratios.values())
        reporter.note(
            f"{len(done.packed)} frozen layers are packed ({done.bytes / 1e6:,.0f} MB more); "
            f"measured here, that takes down to {best:.2f} of the plain time."
        )
    return done.packed


def recompute_frozen(model: nn.Module, reporter: Reporter) -> None:
    """Let backward make cheap outputs again in place of keeping them; the reporter is told which.

    The numbers stay the same bit for bit, so that a run may go on with or without it.
    """
    done = recompute_activations(model)
    kinds = {"norms": done.norms, "activations": done.activations, "gated MLPs": done.gated}
    found = ", ".join(f"{kind} {len(names)}" for kind, names in kinds.items() if names)
    reporter.note(f"Run again in backward: {found or 'nothing, as no module qualifies'}.")
