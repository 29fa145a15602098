"""One training step, forward and backward and optimiser: PEFT, Rankwise, and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.speed.models import LINEAR, batch_of, floor, llama, minilm, ours, theirs
from benchmarks.speed.timing import alternate, ratio
from torch import Tensor, nn

import rankwise as rw
from rankwise.data.language import IGNORED
from rankwise.train.attention import attending, products_up_to
from rankwise.train.frozen import train_mode
from rankwise.train.language import POSITIONS, summed_loss

__all__ = ["loss_of_targets", "rows", "step_of"]

LOSSES = 30  # steps over which the losses are compared


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """A row of the table for each model, number format and choice of layers, and with dropout."""
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # elsewhere a step takes minutes
    formats = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if half else {})
    for name, dtype in formats.items():
        bert = f"MiniLM, {name}", minilm(dtype), "bert.embeddings"
        small = f"Llama 4 × 512, {name}", llama(4, 512, dtype), "model.layers.0.input_layernorm"
        batches = batch_of(32, 34, 30_000, classes=2), batch_of(4, 128, 32_000, classes=None)
        for kind, (on, base, first), batch in zip(LINEAR, (bert, small), batches, strict=True):
            for layers in LINEAR[kind]:
                yield _row(on, base, first, kind, layers, batch, rounds)
            yield _row(on, base, first, kind, "all linear", batch, rounds, dropout=0.05)


def _row(
    model: str,
    base: nn.Module,
    first: str,
    kind: str,
    layers: str,
    batch: dict[str, torch.Tensor],
    rounds: int,
    dropout: float = 0.0,
) -> dict[str, Any]:
    targets = LINEAR[kind][layers]
    contenders = {
        "floor": floor(base, first),
        "peft": theirs(base, targets, dropout=dropout),
        "ours": ours(base, targets, dropout=dropout),
    }
    count, length = batch["input_ids"].shape
    faster = {
        "optimized floor": floor(base, first),
        "optimized": ours(base, targets, dropout=dropout),
        "as fit": ours(base, targets, dropout=dropout),
    }
    done = [rw.optimize_frozen(m, count * length) for m in faster.values()]
    train_mode(faster["as fit"], base_dropout=False)
    products = products_up_to(faster["as fit"], length)
    contenders |= faster
    steps = {name: step_of(m, batch) for name, m in contenders.items()}
    loss = loss_of_targets(faster["as fit"], batch) if kind == "llama" else None
    steps["as fit"] = _attending(products, length, step_of(faster["as fit"], batch, loss))
    seconds = alternate(steps, rounds)
    dropped = f", dropout {dropout:g}" if dropout else ""
    found = {
        "measure": f"training step, {layers}{dropped}: PEFT / ours",
        "on": model,
        **_numbers("ratio", ratio(seconds["peft"], seconds["optimized"])),
        **_numbers("over_floor", ratio(seconds["optimized"], seconds["optimized floor"])),
        **_numbers("PEFT_/_ours_as_fit_runs_it", ratio(seconds["peft"], seconds["as fit"])),
        "packed": len(done[1].packed),
        "dropouts by seed": len(done[1].dropouts),
        "attention by products up to": products,
        "milliseconds": {n: 1e3 * sorted(s)[len(s) // 2] for n, s in seconds.items()},
    }
    if not dropout:  # with it the two draw other masks
        found["losses_apart"], found["from_float64"] = _losses_apart(base, targets, batch)
    return found


def _attending(products: int, length: int, step: Callable[[], float]) -> Callable[[], float]:
    def run() -> float:
        with attending(products, length):
            return step()

    return run


def loss_of_targets(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], Tensor]:
    """The loss of a language model as `fit` computes it, which knows where the targets are."""
    at = (batch["labels"][:, 1:].flatten() != IGNORED).nonzero()[:, 0]
    return lambda: summed_loss(model, {**batch, POSITIONS: at}) / len(at)


def _numbers(name: str, made: Any) -> dict[str, list[float]]:
    return {name: [made.value, made.low, made.high]}


def step_of(
    model: nn.Module, batch: dict[str, torch.Tensor], loss_of: Callable[[], Tensor] | None = None
) -> Callable[[], float]:
    """One step as a function, by the model's own loss or another; it gives the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True) if trained else None

    def step() -> float:
        loss: Tensor = model(**batch).loss if loss_of is None else loss_of()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def _losses_apart(
    base: nn.Module, targets: list[str], batch: dict[str, torch.Tensor]
) -> tuple[float, dict[str, float]]:
    """The largest difference of PEFT's and our loss over the first steps, without dropout.

    And that of each from the same steps in float64, which says how much of it is rounding.
    """
    few = {name: tensor[:4] for name, tensor in batch.items()}

    def losses(model: nn.Module) -> list[float]:
        step = step_of(model.eval(), few)
        return [step() for _ in range(LOSSES)]

    made = {"peft": losses(theirs(base, targets)), "ours": losses(ours(base, targets))}
    exact = losses(ours(base, targets).double())
    assert exact[0] != exact[-1]

    def apart(first: list[float], second: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(first, second, strict=True))

    return apart(*made.values()), {name: apart(found, exact) for name, found in made.items()}
