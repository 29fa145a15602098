"""The loss of a language model: transformers' own of all logits, and ours of the targets' alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.speed.models import LINEAR, batch_of, llama, ours
from benchmarks.speed.timing import alternate, ratio
from torch import Tensor, nn

from rankwise.data.encode import Encoded
from rankwise.train.language import POSITIONS, positions, summed_loss

__all__ = ["largest", "programs", "rows"]

ROWS, LENGTH, VOCABULARY = 8, 128, 32_000


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """A row for texts that are learned whole, and for answers to prompts of half the length."""
    model = ours(llama(4, 512, torch.float32), LINEAR["llama"]["query and value"])
    for said, share in (("every token a target", 0.0), ("half of them a prompt's", 0.5)):
        own, other, losses = programs(model, share)
        seconds = alternate({"transformers": other, "ours": own}, rounds)
        made = ratio(seconds["transformers"], seconds["ours"])
        yield {
            "measure": f"step of a language model, {said}: transformers' loss / ours",
            "on": "Llama 4 × 512, 32,000 words, float32",
            "ratio": [made.value, made.low, made.high],
            "losses apart": abs(losses[0] - losses[1]),
            "milliseconds": {n: 1e3 * sorted(s)[len(s) // 2] for n, s in seconds.items()},
            "bytes of the largest tensor": {
                "transformers": largest(other),
                "ours": largest(own),
            },
        }


def programs(
    model: nn.Module, share: float
) -> tuple[Callable[[], object], Callable[[], object], tuple[float, float]]:
    """Forward and backward by our loss and by transformers', and the mean losses of the two."""
    batch = batch_of(ROWS, LENGTH, VOCABULARY, None)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    labels = batch["labels"]
    for row, length in enumerate(lengths):
        labels[row, : int(share * length)] = -100
    encoded = Encoded(batch["input_ids"].tolist(), lengths, list(range(ROWS)), labels.tolist())
    at = torch.tensor(positions(encoded, list(range(ROWS)), LENGTH))

    def own() -> Tensor:
        loss = summed_loss(model, {**batch, POSITIONS: at}) / len(at)
        loss.backward()
        return loss.detach()

    def other() -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return own, other, (float(own()), float(other()))


def largest(program: Callable[[], object]) -> int:
    """Bytes of the largest tensor that an operation of a program makes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            made = func(*args, **(kwargs or {}))
            sizes.extend(t.nbytes for t in tree_leaves(made) if isinstance(t, Tensor))
            return made

    with Watch():
        program()
    return max(sizes)
