"""Several adapters in one pass over one frozen base, beside the same adapters one after the other.

    python -m benchmarks.bank [--adapters 8] [--rows 8] [--length 34] [--rounds 15] [--device cpu]

MiniLM with a trained head for each adapter, dropout as it comes. Each adapter has as many rows of
its own. A training step is forward, backward and AdamW for all adapters; a ratio below 1 means that
one pass is faster. Times are medians of rounds in which the programs alternate, ratios have a 95 %
interval. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarks.speed.models import LINEAR, batch_of, minilm
from benchmarks.speed.timing import alternate, ratio
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import logging

import rankwise as rw

__all__ = ["Bank", "programs", "rows"]

Batch = dict[str, Tensor]
Program = Callable[[], object]
SHARED, APART, SINGLE, FLOOR = "one pass", "one by one", "one adapter", "one adapter, all rows"


@dataclass(frozen=True)
class Bank:
    """What is compared: so many adapters with so many rows each, on these layers of a base."""

    base: Any
    targets: list[str]
    adapters: int
    rows: int
    length: int

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return [f"n{i}" for i in range(self.adapters)]

    def model(self, names: list[str]) -> nn.Module:
        """A copy of the base with these adapters, each of a rank and a seed of its own."""
        model = copy.deepcopy(self.base).train()
        skip = [n for n, _ in model.named_modules() if n.endswith("pooler.dense")]
        for name in names:
            seed = self.names.index(name)
            torch.manual_seed(seed)
            r = (4, 6, 8)[seed % 3]
            method = rw.LoRA(r, target_modules=self.targets, exclude_modules=skip, head="train")
            rw.attach(model, method, name=name)
        return model

    def batch(self) -> Batch:
        """The rows of all adapters, those of one beside each other."""
        words = self.base.get_input_embeddings().weight
        made = batch_of(self.rows * self.adapters, self.length, len(words), classes=2)
        return {name: tensor.to(words.device) for name, tensor in made.items()}


def programs(bank: Bank) -> dict[str, Program]:
    """A training step of all in one pass, and one by one; of one, and of one with all rows."""
    whole = bank.batch()
    parts = [
        {name: tensor[i * bank.rows :][: bank.rows] for name, tensor in whole.items()}
        for i in range(bank.adapters)
    ]
    apart = [
        _step(bank.model([name]), [name], part)
        for name, part in zip(bank.names, parts, strict=True)
    ]
    return {
        SHARED: _step(bank.model(bank.names), bank.names, whole),
        APART: lambda: [step() for step in apart],
        SINGLE: _step(bank.model(["n0"]), ["n0"], parts[0]),
        FLOOR: _step(bank.model(["n0"]), ["n0"], whole),
    }


def _step(model: nn.Module, names: list[str], batch: Batch) -> Program:
    """One step: the sum of every adapter's mean loss over its own rows."""
    groups = [group for name in names for group in rw.parameter_groups(model, 1e-3, name=name)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    rows = [name for name in names for _ in range(len(labels) // len(names))]

    def run() -> Tensor:
        with rw.using_rows(model, rows) if len(names) > 1 else contextlib.nullcontext():
            logits = model(**inputs).logits
        losses = F.cross_entropy(logits, labels, reduction="none").view(len(names), -1).mean(1)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return _waited(losses)

    return run


def mixed(bank: Bank) -> dict[str, Program]:
    """Inference on a batch whose rows are in any order: in one pass, and adapter by adapter."""
    model, batch = bank.model(bank.names).eval(), bank.batch()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    rows = bank.names * bank.rows

    @torch.no_grad()
    def shared() -> Tensor:
        with rw.using_rows(model, rows):
            return _waited(model(**inputs).logits)

    @torch.no_grad()
    def apart() -> Tensor:
        found: list[Tensor] = []
        for i, name in enumerate(bank.names):
            with rw.using(model, name):
                mine = {key: tensor[i :: bank.adapters] for key, tensor in inputs.items()}
                found.append(model(**mine).logits)
        return _waited(torch.stack(found, 1).flatten(0, 1))

    torch.testing.assert_close(shared(), apart(), rtol=1e-3, atol=1e-3)
    return {SHARED: shared, APART: apart}


def _waited(t: Tensor) -> Tensor:
    """The numbers on the CPU, and so the time until they are there."""
    return t.detach().cpu()


def rows(make: Callable[[list[str]], Bank], rounds: int) -> Iterator[str]:
    """Rows of the table in Markdown, one when it is known."""
    yield "| what | one pass, ms | / one by one | / one adapter | / one adapter, all rows |"
    yield "|---|--:|--:|--:|--:|"
    kinds: dict[str, Callable[[Bank], dict[str, Program]]] = {
        "training step": programs,
        "mixed rows, no gradients": mixed,
    }
    for layers, targets in LINEAR["bert"].items():
        for kind, of in kinds.items():
            seconds = alternate(of(make(targets)), rounds)
            first = seconds[SHARED]
            cells = [f"{1e3 * sorted(first)[len(first) // 2]:.1f}"]
            for other in (APART, SINGLE, FLOOR):
                found = ratio(first, seconds[other]) if other in seconds else None
                cells.append(
                    f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})" if found else "-"
                )
            yield f"| {kind}, {layers} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("adapters", 8), ("rows", 8), ("length", 34), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    logging.set_verbosity_error()
    base = minilm(torch.float32).to(given.device)
    make: Any = partial(Bank, base, adapters=given.adapters, rows=given.rows, length=given.length)
    print(
        f"{given.adapters} adapters with {given.rows} rows of up to {given.length} tokens each, "
        f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    for line in rows(make, given.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
