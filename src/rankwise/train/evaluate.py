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
from rankwise.train.metrics import score
from rankwise.train.precision import allocation_failed
from rankwise.train.reporter import Reporter, Silent

__all__ = ["Rows", "batch_loss", "evaluate", "outputs", "targets_in"]


@dataclass(frozen=True)
class Rows:
    """Encoded rows and what is needed to make batches of them for a model.

    Attributes:
        encoded: the rows.
        task: "classification", "regression" or "causal-lm".
        pad_id: the token that fills short rows.
        device: where batches go.
    """

    encoded: Encoded
    task: str
    pad_id: int
    device: torch.device

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """The tensors of these rows, on the device."""
        made = collate(self.encoded, indices, self.pad_id)
        return {name: tensor.to(self.device) for name, tensor in made.items()}


def batch_loss(model: nn.Module, batch: Mapping[str, Tensor], task: str) -> tuple[Tensor, Tensor]:
    """The sum of a batch's losses (a scalar with a gradient) and the model's logits, in float32.

    Cross-entropy over rows for classification, squared error for regression; for a language model
    cross-entropy of each token given those before it, over the tokens whose label is not -100.
    Sums, so that a batch cut into parts gives the same gradient as the whole.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    result: Any = model(**inputs)
    logits: Tensor = result.logits.float()
    labels = batch["labels"]
    if task == "causal-lm":
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        return F.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum"), logits
    if task == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum"), logits
    return F.cross_entropy(logits, labels, reduction="sum"), logits


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
    watcher = reporter or Silent()
    pending = BatchPlan(rows.encoded.lengths, batch_size, shuffle=False).epoch(0)[::-1]
    was_training = model.training
    model.eval()
    kept: dict[int, NDArray[np.float32]] = {}
    loss, count, done = 0.0, 0, 0
    watcher.start("evaluating", len(rows.encoded))
    try:
        with torch.no_grad():
            while pending:
                indices = pending.pop()
                try:
                    part, logits = _pass(model, rows, indices)
                except (RuntimeError, MemoryError) as error:
                    if not allocation_failed(error):
                        raise
                    pending.extend(_halves(indices, error))
                    continue
                if rows.encoded.labels is not None:
                    loss += part
                    count += targets_in(rows.encoded, indices, rows.task)
                if rows.task != "causal-lm":
                    kept.update(zip(indices, logits.cpu().numpy(), strict=True))
                done += len(indices)
                watcher.advance(done, {})
    finally:
        watcher.finish()
        model.train(was_training)
    mean = loss / count if count else float("nan")
    if rows.task == "causal-lm":
        return None, mean
    stacked = np.stack([kept[i] for i in range(len(rows.encoded))])
    return (stacked[:, 0] if rows.task == "regression" else stacked), mean


def _pass(model: nn.Module, rows: Rows, indices: list[int]) -> tuple[float, Tensor]:
    """The summed loss of some rows, 0 where they have no labels, and their logits."""
    batch = rows.batch(indices)
    if "labels" not in batch:
        return 0.0, model(**batch).logits.float()
    loss, logits = batch_loss(model, batch, rows.task)
    return loss.item(), logits


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
    predictions, loss = outputs(model, rows, batch_size, reporter)
    labels = None if predictions is None else np.asarray(rows.encoded.labels, dtype=np.float64)
    return dict(score(rows.task, loss, predictions, labels))
