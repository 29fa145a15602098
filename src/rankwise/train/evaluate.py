"""Run a model over encoded rows: outputs in row order, and the task's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.data.batches import BatchPlan, collate
from rankwise.data.encode import Encoded
from rankwise.errors import EnvironmentFault
from rankwise.train import language
from rankwise.train.answers import Answers
from rankwise.train.frozen_cache import HIDDEN, Kept
from rankwise.train.language import POSITIONS, positions
from rankwise.train.metrics import score
from rankwise.train.precision import allocation_failed
from rankwise.train.reporter import Reporter, Silent

__all__ = [
    "Rows",
    "batch_loss",
    "evaluate",
    "measure",
    "outputs",
    "part_losses",
    "row_losses",
    "targets_in",
]


@dataclass(frozen=True)
class Rows:
    """Encoded rows and what is needed to make batches of them for a model.

    Attributes:
        encoded: the rows.
        task: "classification", "regression" or "causal-lm".
        pad_id: the token that fills short rows.
        device: where batches go.
        kept: what the frozen layers give for each row, where that is not computed each time.
    """

    encoded: Encoded
    task: str
    pad_id: int
    device: torch.device
    kept: Kept | None = None

    def batch(self, indices: list[int], *, targets: bool = False) -> dict[str, Tensor]:
        """The tensors of these rows, on the device; with ``POSITIONS`` where targets are wanted."""
        made = collate(self.encoded, indices, self.pad_id)
        batch = {name: tensor.to(self.device) for name, tensor in made.items()}
        if targets and self.task == "causal-lm" and self.encoded.labels is not None:
            at = positions(self.encoded, indices, made["input_ids"].shape[1])
            batch[POSITIONS] = torch.tensor(at, dtype=torch.int64, device=self.device)
        if self.kept is not None:
            batch[HIDDEN] = self.kept.get(indices, batch["attention_mask"])
        return batch


def batch_loss(model: nn.Module, batch: Mapping[str, Tensor], task: str) -> Tensor:
    """The sum of a batch's losses in float32, a scalar with a gradient.

    A sum, so that a batch cut into parts gives the same gradient as the whole.
    """
    if task == "causal-lm":
        return language.summed_loss(model, batch)
    return row_losses(model, batch, task)[0].sum()


def part_losses(model: nn.Module, batch: Mapping[str, Tensor], task: str, parts: int) -> Tensor:
    """The :func:`batch_loss` of each of so many parts of a batch, (parts,).

    The parts lie one after the other and have as many rows each, and for a language model as many
    targets.
    """
    if task == "causal-lm":
        return language.summed_losses(model, batch, parts)
    return row_losses(model, batch, task)[0].view(parts, -1).sum(1)


def row_losses(
    model: nn.Module, batch: Mapping[str, Tensor], task: str
) -> tuple[Tensor, Tensor | None]:
    """The loss of each row of a batch, (rows,), and the model's logits, in float32.

    Cross-entropy for classification, squared error for regression; for a language model the sum of
    the cross-entropies of each token given those before it, over the tokens whose label is not
    -100, and no logits.
    """
    if task == "causal-lm":
        return language.row_losses(model, batch), None
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    result: Any = model(**inputs)
    logits: Tensor = result.logits.float()
    labels = batch["labels"]
    if task == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="none"), logits
    return F.cross_entropy(logits, labels, reduction="none"), logits


def targets_in(encoded: Encoded, indices: list[int], task: str) -> int:
    """How many losses these rows add up to: rows, or target tokens for a language model."""
    if task != "causal-lm":
        return len(indices)
    labels: Any = encoded.labels
    return sum(label != -100 for i in indices for label in labels[i][1:])


def outputs(
    model: nn.Module, rows: Rows, batch_size: int, reporter: Reporter | None = None
) -> tuple[NDArray[np.float32] | None, float]:
    """Outputs of every row in row order, and the mean loss (NaN where the rows have no labels).

    The outputs are logits (rows, classes) or predictions (rows,); None for a language model,
    whose logits would not fit. The model is put in evaluation mode and back. A batch that does
    not fit in memory is cut in half.

    Raises:
        EnvironmentFault: a single row does not fit.
    """
    found, losses = _run(model, rows, batch_size, reporter or Silent())
    return found, _mean(losses, rows)


def _run(
    model: nn.Module, rows: Rows, batch_size: int, watcher: Reporter
) -> tuple[NDArray[np.float32] | None, NDArray[np.float64]]:
    """Outputs of every row, None for a language model, and the rows' losses, 0 without labels."""
    pending = BatchPlan(rows.encoded.lengths, batch_size, shuffle=False).epoch(0)[::-1]
    was_training = model.training
    model.eval()
    kept: dict[int, NDArray[np.float32]] = {}
    losses = np.zeros(len(rows.encoded))
    done = 0
    watcher.start("evaluating", len(rows.encoded))
    try:
        with torch.no_grad():
            while pending:
                indices = pending.pop()
                try:
                    losses[indices], logits = _pass(model, rows, indices)
                except (RuntimeError, MemoryError) as error:
                    if not allocation_failed(error):
                        raise
                    pending.extend(_halves(indices, error))
                    continue
                if logits is not None:
                    kept.update(zip(indices, logits.cpu().numpy(), strict=True))
                done += len(indices)
                watcher.advance(done, {})
    finally:
        watcher.finish()
        model.train(was_training)
    if rows.task == "causal-lm":
        return None, losses
    stacked = np.stack([kept[i] for i in range(len(rows.encoded))])
    return (stacked[:, 0] if rows.task == "regression" else stacked), losses


def _mean(losses: NDArray[np.float64], rows: Rows) -> float:
    """The mean loss over the targets of all rows; NaN without labels."""
    if rows.encoded.labels is None:
        return float("nan")
    count = targets_in(rows.encoded, list(range(len(rows.encoded))), rows.task)
    return float(losses.sum()) / count if count else float("nan")


def _pass(
    model: nn.Module, rows: Rows, indices: list[int]
) -> tuple[float | NDArray[np.float32], Tensor | None]:
    """The losses of some rows, 0 where they have no labels, and their logits."""
    batch = rows.batch(indices, targets=True)
    if "labels" not in batch:
        logits = model(**batch).logits.float()
        return 0.0, None if rows.task == "causal-lm" else logits
    losses, logits = row_losses(model, batch, rows.task)
    return losses.cpu().numpy(), logits


def _halves(indices: list[int], error: BaseException) -> tuple[list[int], list[int]]:
    """The second half of a batch and the first, which is taken from the end of a list."""
    if len(indices) == 1:
        raise EnvironmentFault(
            "Memory ran out with a single row. Use a smaller --max-length, or --dtype bfloat16."
        ) from error
    middle = len(indices) // 2
    return indices[middle:], indices[:middle]


def evaluate(
    model: nn.Module, rows: Rows, batch_size: int, reporter: Reporter | None = None
) -> dict[str, float]:
    """The task's metrics over labelled rows."""
    return measure(model, rows, batch_size, reporter)[0]


def measure(
    model: nn.Module, rows: Rows, batch_size: int, reporter: Reporter | None = None
) -> tuple[dict[str, float], Answers]:
    """The task's metrics over labelled rows, and the answer to each row."""
    found, losses = _run(model, rows, batch_size, reporter or Silent())
    labels = None if found is None else np.asarray(rows.encoded.labels, dtype=np.float64)
    metrics = dict(score(rows.task, _mean(losses, rows), found, labels))
    classes = found.shape[1] if found is not None and rows.task == "classification" else 0
    guessed = found.argmax(axis=1) if found is not None and classes else found
    answers = Answers(
        rows=np.asarray(rows.encoded.kept, dtype=np.int64),
        losses=losses,
        targets=np.asarray([targets_in(rows.encoded, [i], rows.task) for i in range(len(losses))]),
        labels=labels,
        predictions=None if guessed is None else guessed.astype(np.float64),
        classes=classes,
    )
    return metrics, answers
