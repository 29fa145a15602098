"""Memory of a training step: bytes kept for backward, PEFT's and ours, and what fewer cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.speed.models import LINEAR, batch_of, floor, llama, minilm, ours, theirs
from benchmarks.speed.steps import step_of
from benchmarks.speed.timing import alternate, ratio
from torch import Tensor, nn

import rankwise as rw

__all__ = ["kept", "rows"]

FIRST = "model.layers.0.input_layernorm"
WIDTH, TOKENS = 512, 64


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Counts beside the floor's, then by token and layer, then the time that recomputing takes."""
    yield from _beyond_floor()
    for dropout in (0.0, 0.05):
        yield _by_layer(dropout)
    yield _time(
        "MiniLM, float32", minilm(torch.float32), "bert", batch_of(32, 34, 30_000, 2), rounds
    )
    small, batch = llama(4, 512, torch.float32), batch_of(4, 128, 32_000, None)
    yield _time("Llama 4 × 512, float32", small, "llama", batch, rounds)


def _beyond_floor() -> Iterator[dict[str, Any]]:
    """A row of the table for each model and choice of layers; counted, not timed."""
    bert, small = minilm(torch.float32), llama(4, 512, torch.bfloat16)
    cases = [
        ("bert", "MiniLM, float32", bert, batch_of(4, 34, 30_000, 2), "bert.embeddings"),
        (
            "llama",
            "Llama 4 × 512, bfloat16",
            small,
            batch_of(1, 32, 32_000, None),
            FIRST,
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


def _by_layer(dropout: float) -> dict[str, Any]:
    """Bytes that one layer more of a Llama keeps for each token, over the width d.

    Keys and values are d / 4 wide and the MLP 3.5 d, as in Llama 3 of 8B.
    """
    targets = LINEAR["llama"]["all linear"]
    contenders: dict[str, Callable[[nn.Module], nn.Module]] = {
        "peft": lambda base: theirs(base, targets, dropout=dropout),
        "peft, bfloat16 adapters": lambda base: theirs(
            base, targets, dropout=dropout, autocast_adapter_dtype=False
        ),
        "ours": lambda base: ours(base, targets, dropout=dropout),
        "ours, recomputing": lambda base: _recomputing(ours(base, targets, dropout=dropout)),
        "floor": lambda base: floor(base, FIRST),
        "floor, recomputing": lambda base: _recomputing(floor(base, FIRST)),
    }
    batch = batch_of(1, TOKENS, 1_000, None)
    bases = [_llama_3(layers) for layers in (2, 3)]
    found: dict[str, float] = {}
    for name, make in contenders.items():
        less, more = (kept(make(base), batch) for base in bases)
        found[name] = (more - less) / (TOKENS * WIDTH)
    return {
        "measure": f"bytes kept for a token by a layer, dropout {dropout:g}: recomputing / PEFT",
        "on": f"Llama of width d = {WIDTH}, bfloat16, all linear",
        "ratio": [found["ours, recomputing"] / found["peft"]] * 3,
        "bytes_/_d": found,
    }


def _llama_3(layers: int) -> nn.Module:
    """A Llama of the proportions of Llama 3 of 8B with random weights, in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=7 * WIDTH // 2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1_000,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def _recomputing(model: nn.Module) -> nn.Module:
    rw.recompute_activations(model)
    return model


def _time(
    on: str, base: nn.Module, kind: str, batch: dict[str, Tensor], rounds: int
) -> dict[str, Any]:
    """A training step with what it keeps made again, over one that keeps it."""
    plain, less = (ours(base, LINEAR[kind]["all linear"]) for _ in range(2))
    rw.recompute_activations(less)
    sizes = {"plain": kept(plain, batch), "recomputing": kept(less, batch)}
    steps = {"plain": step_of(plain, batch), "recomputing": step_of(less, batch)}
    losses: list[float] = []
    for step in steps.values():
        torch.manual_seed(0)  # the models have dropout of their own
        losses.append(step())
    seconds = alternate(steps, rounds)
    made = ratio(seconds["recomputing"], seconds["plain"])
    return {
        "measure": "training step, all linear: recomputing / keeping",
        "on": on,
        "ratio": [made.value, made.low, made.high],
        "losses_apart": abs(losses[0] - losses[1]),
        "bytes": sizes,
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
