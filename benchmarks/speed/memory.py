"""Memory of a training step beyond the floor's: bytes kept for backward, PEFT's and ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.speed.models import LINEAR, batch_of, floor, llama, minilm, ours, theirs
from torch import Tensor, nn

__all__ = ["kept", "rows"]


def rows() -> Iterator[dict[str, Any]]:
    """A row of the table for each model and choice of layers; counted, not timed."""
    bert, small = minilm(torch.float32), llama(4, 512, torch.bfloat16)
    cases = [
        ("bert", "MiniLM, float32", bert, batch_of(4, 34, 30_000, 2), "bert.embeddings"),
        (
            "llama",
            "Llama 4 × 512, bfloat16",
            small,
            batch_of(1, 32, 32_000, None),
            "model.layers.0.input_layernorm",
        ),
    ]
    for kind, on, base, batch, first in cases:
        for layers, targets in LINEAR[kind].items():
            low = kept(floor(base, first), batch)
            peft, own = (kept(make(base, targets), batch) - low for make in (theirs, ours))
            yield {
                "measure": f"bytes kept for backward beyond the floor's, {layers}: ours / PEFT",
                "on": on,
                "ratio": [own / peft] * 3,
                "bytes": {"floor": low, "peft": peft, "ours": own},
            }


def kept(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes of all storages that a forward keeps for backward, parameters and buffers left out."""
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, tuple[int, Tensor]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        sizes[storage.data_ptr()] = (storage.nbytes(), saved)  # held, so that its address is too
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = model(**batch).loss
    assert loss.requires_grad
    return sum(size for at, (size, _) in sizes.items() if at not in there)
