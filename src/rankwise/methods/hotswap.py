"""hotswap: another adapter's numbers in the places of an attached one, nothing compiled again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rankwise.attaching import attachment, low_rank_updates, note_method, trained_copies
from rankwise.errors import ArtifactError, UserError, gather, nearest
from rankwise.layers import LowRank
from rankwise.methods.adapter import Adapter
from rankwise.methods.restate import plain, restated

__all__ = ["hotswap"]


def hotswap(model: nn.Module, adapter: Adapter, *, name: str | None = None) -> None:
    """Put another adapter's numbers in the place of an attached one that has slots.

    No module, shape or attribute changes, so a compiled model is not compiled again: A and B are
    copied in, filled up with zeros, and the scale is a number in a tensor. The attached one must
    have been made with ``LoRA(slot=R)``, R being at least the largest rank of the new one (twice
    that, where it has a start). What the new one does not adapt gets a zero update. Modules
    trained whole, such as the head, must be the same ones. :func:`rankwise.adapter_of` then gives
    the new adapter.

    Args:
        name: of the attached adapter; None for the only one.

    Raises:
        UserError: nothing is attached, or it has no slots.
        ArtifactError: lists what of the adapter finds no room.
    """
    low = low_rank_updates(model, name)
    copies = trained_copies(model, name)
    if not low or any(update.spec.slot is None for update in low.values()):
        raise UserError(
            "This adapter has no slots. Attach it with LoRA(..., slot=R), R being the largest "
            "rank that is to find room."
        )
    new = plain(adapter)
    gather(ArtifactError, "The adapter has no room here", list(_misfits(new, low, copies)))
    with torch.no_grad():
        for place, update in low.items():
            _fill(update, new, place)
        for place, module in copies.items():
            prefix = place + "."
            state = {
                k.removeprefix(prefix): t for k, t in new.trained.items() if k.startswith(prefix)
            }
            module.load_state_dict(state)
    method = restated(new.method, new.factors)
    note_method(model, attachment(model, name).name, method, tuple(new.factors))


def _fill(update: LowRank, adapter: Adapter, place: str) -> None:
    update.lora_A.zero_()
    update.lora_B.zero_()
    if update.start_A is not None and update.start_B is not None:
        update.start_A.zero_()
        update.start_B.zero_()
    if place in adapter.factors:
        factors = adapter.factors[place]
        update.lora_A[: factors.r].copy_(factors.A)
        update.lora_B[:, : factors.r].copy_(factors.B)
        assert isinstance(update.scale, Tensor)
        update.scale.fill_(factors.scale)


def _misfits(
    adapter: Adapter, low: Mapping[str, LowRank], copies: Mapping[str, nn.Module]
) -> Iterator[str]:
    further = {"magnitudes": adapter.magnitudes, "biases": adapter.biases, "rows": adapter.tokens}
    yield from (
        f"it has trained {what}, and a slot has none." for what, has in further.items() if has
    )
    if adapter.method.tied:
        yield "its updates are on tied weights, and a slot is on one layer alone."
    for name, module in copies.items():
        have = {k: tuple(t.shape) for k, t in module.state_dict().items()}
        prefix = name + "."
        found = {k: tuple(t.shape) for k, t in adapter.trained.items() if k.startswith(prefix)}
        new = {k.removeprefix(prefix): shape for k, shape in found.items()}
        if name in adapter.modules and have != new:
            yield f"its '{name}' holds {new}, and the attached one's {have}."
    if set(adapter.modules) != set(copies):
        yield f"it trained {list(adapter.modules)} whole, and the attached one {list(copies)}."
    for name, factors in adapter.factors.items():
        if name not in low:
            yield f"nothing is attached at '{name}'.{nearest(name, low)}"
            continue
        A, B = low[name].lora_A, low[name].lora_B
        if factors.r > A.shape[0]:
            yield f"'{name}' has rank {factors.r}, and the slot has room for {A.shape[0]}."
        elif (factors.in_features, factors.out_features) != (A.shape[1], B.shape[0]):
            yield (
                f"'{name}' maps {factors.in_features} to {factors.out_features}, and "
                f"{A.shape[1]} to {B.shape[0]} in the model."
            )
