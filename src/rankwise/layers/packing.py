"""optimize_frozen, restore_frozen: frozen layers computed by the fastest kernels there are here."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from rankwise.errors import UserError
from rankwise.kernels import PackedLinear
from rankwise.layers.dropping import all_by_seed, drop_as_torch
from rankwise.layers.fusing import pack, unpack

__all__ = ["Packing", "optimize_frozen", "restore_frozen"]

_WORTH = 0.95  # a kernel is taken when it needs at most so much of the plain one's time
_LEAST = 1 << 16  # numbers of a weight that is packed: for fewer there is nothing to gain
_ROUNDS = 5


@dataclass(frozen=True)
class Packing:
    """What :func:`optimize_frozen` did.

    Attributes:
        packed: names of the layers whose weight is packed now.
        bytes: memory that this takes beside the weights.
        ratios: measured time of the packed kernels over that of the plain ones, forward and
            gradient together, by shape (out, in); empty where nothing was measured.
        dropouts: names of the modules whose dropout is drawn by seed now.
    """

    packed: tuple[str, ...]
    bytes: int
    ratios: dict[tuple[int, int], float]
    dropouts: tuple[str, ...] = ()


def optimize_frozen(model: nn.Module, rows: int = 1024, *, measure: bool = True) -> Packing:
    """Let the frozen linear layers of a model compute by the fastest kernels of this machine.

    Candidates are torch's plain product and, on a CPU, oneDNN's with a weight that is packed once
    (:class:`rankwise.kernels.PackedLinear`); they are measured here, by some twenty products for
    each shape of 2¹⁶ numbers or more, and the packed ones are taken where they are faster. Frozen
    nn.Linear and Conv1D take part, adapted or not. Packed kernels sum in another order: outputs
    differ by a few roundings. Packing costs twice the bytes of the weights it is used for.

    The dropout of a model takes a good part of a step where torch draws one number after the
    other, as it does on processors that are not Intel's. On a CPU modules of class nn.Dropout draw
    by seed from now on: with the same probability, to 2⁻¹⁶, and other draws, which still follow
    from torch.manual_seed; backward draws again, so that no mask is kept. Nothing is measured
    for this, so that what a seed gives does not hang on a clock.

    Parameters, state dict, classes and adapters stay as they are, and a weight that is written or
    begins to train later is computed plainly from then on; but a write into ``weight.data`` goes
    unseen, as it does by autograd: restore before one. Called again, it chooses anew.
    :func:`restore_frozen` is the inverse.

    Args:
        model: with its frozen parameters not requiring gradients, as after
            :func:`rankwise.attach`.
        rows: tokens that pass through the layers at a time, batch times length.
        measure: False takes the packed kernels without measuring.

    Raises:
        UserError: ``rows`` is below 1.
    """
    if rows < 1:
        raise UserError(f"optimize_frozen: rows must be 1 or more, got {rows}.")
    restore_frozen(model)
    ratios: dict[tuple[int, int], float] = {}
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    dropouts = all_by_seed(model) if on_cpu else ()
    chosen: list[str] = []
    size = 0
    for name, module in model.named_modules():
        packed = pack(module, rows)
        if packed is None:
            continue
        if measure and packed.plain.weight.numel() < _LEAST:
            unpack(module)
            continue
        shape = (packed.plain.weight.shape[0], packed.plain.weight.shape[1])
        if measure and shape not in ratios:
            ratios[shape] = _ratio(packed, rows)
        if measure and ratios[shape] > _WORTH:
            unpack(module)
            continue
        chosen.append(name)
        size += packed.nbytes
    return Packing(tuple(chosen), size, ratios, dropouts)


def restore_frozen(model: nn.Module) -> int:
    """Let every layer compute as torch does again; how many did not.

    Those that a merge keeps aside are not in the model: unmerge it first.
    """
    return sum(unpack(module) or drop_as_torch(module) for module in model.modules())


def _ratio(packed: PackedLinear, rows: int) -> float:
    """Packed over plain time, forward and gradient; the least of some rounds in turn."""
    weight = packed.plain.weight
    x, dy = (weight.new_ones(rows, width) for width in (weight.shape[1], weight.shape[0]))
    with torch.no_grad():
        packed.backward(packed.forward(dy.new_ones(1, weight.shape[1])))  # packs, outside the times
        best = [float("inf"), float("inf")]
        for _ in range(_ROUNDS):
            for i, layer in enumerate((packed, packed.plain)):
                start = time.perf_counter()
                layer.forward(x)
                layer.backward(dy)
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]
