"""What a run's model answered to each evaluation row, and what each row adds to a metric."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.errors import ArtifactError
from rankwise.io.tensors import read_tensors, write_tensors

__all__ = ["NAME", "Answers", "read_answers", "write_answers"]

NAME = "answers.safetensors"
_KIND = "rankwise answers 1"
_CHUNK = 256  # rows whose ranks without them are computed at a time


@dataclass(frozen=True, eq=False)
class Answers:
    """One entry for each evaluation row that was measured, in row order.

    Attributes:
        rows: numbers of the rows in the evaluation data, (n,).
        losses: the loss of each row, summed over its targets, (n,).
        targets: how many losses that sum holds, (n,): 1, or the target tokens of a language model.
        labels: class numbers or scores, (n,); None for a language model.
        predictions: the class with the largest logit, or the predicted score, (n,); None for a
            language model.
        classes: how many classes there are; 0 where the labels are no classes.
    """

    rows: NDArray[np.int64]
    losses: NDArray[np.float64]
    targets: NDArray[np.int64]
    labels: NDArray[np.float64] | None = None
    predictions: NDArray[np.float64] | None = None
    classes: int = 0

    def contributions(self, metric: str) -> NDArray[np.float64] | None:
        """One number for each row, (n,), whose spread over the rows is the metric's noise.

        Formula: u_i = n θ − (n − 1) θ₋ᵢ with θ the metric over all rows and θ₋ᵢ over all but row i
        (the jackknife's pseudo-values: Tukey 1958). For an accuracy or a mean loss u_i is the
        row's own value. docs/math.md (22). None where the metric cannot be had from the answers,
        or not without one of the rows.
        """
        if metric == "accuracy" and self.labels is not None and self.predictions is not None:
            return (self.labels == self.predictions).astype(np.float64)
        count = len(self.rows)
        both = self._with_and_without(metric) if count > 2 else None
        if both is None:
            return None
        whole, without = both
        values = count * whole - (count - 1) * without
        return values if bool(np.isfinite(values).all()) else None

    def _with_and_without(self, metric: str) -> tuple[float, NDArray[np.float64]] | None:
        """The metric over all rows, and without each of them, (n,)."""
        if metric in ("loss", "perplexity"):
            loss, targets = self.losses.sum(), self.targets.sum()
            with np.errstate(all="ignore"):
                parts = loss / targets, (loss - self.losses) / (targets - self.targets)
                return parts if metric == "loss" else (float(np.exp(parts[0])), np.exp(parts[1]))
        if self.labels is None or self.predictions is None:
            return None
        if metric in ("f1", "matthews") and self.classes > 1:
            return _of_confusion(self.labels, self.predictions, self.classes, metric)
        if metric == "pearson":
            return _pearson(self.predictions, self.labels)
        return _spearman(self.predictions, self.labels) if metric == "spearman" else None


def write_answers(path: str | os.PathLike[str], answers: Answers, evaluation: str) -> Path:
    """Write the answers whole or not at all; ``evaluation`` is the data's fingerprint."""
    whole = answers.classes > 0
    tensors = {
        "rows": torch.from_numpy(answers.rows.astype(np.int32)),
        "losses": torch.from_numpy(answers.losses.astype(np.float32)),
        "targets": torch.from_numpy(answers.targets.astype(np.int32)),
    }
    for name, values in (("labels", answers.labels), ("predictions", answers.predictions)):
        if values is not None:
            tensors[name] = torch.from_numpy(values.astype(np.int32 if whole else np.float32))
    about = {"kind": _KIND, "evaluation": evaluation, "classes": str(answers.classes)}
    return write_tensors(path, tensors, about)


def read_answers(path: str | os.PathLike[str], evaluation: str) -> Answers:
    """Read what :func:`write_answers` wrote for the evaluation data of this fingerprint.

    Raises:
        UserError: there is no such file.
        ArtifactError: it is damaged, or belongs to other evaluation data.
    """
    file = read_tensors(path, allow_nonfinite=True)
    about, found = file.metadata, {name: t.numpy() for name, t in file.tensors.items()}
    if about.get("kind") != _KIND or not {"rows", "losses", "targets"} <= found.keys():
        raise ArtifactError(f"'{path}' does not hold the answers of a run. Train the run again.")
    if about.get("evaluation") != evaluation:
        raise ArtifactError(
            f"'{path}' belongs to other evaluation data than the run beside it. Train it again."
        )
    if len({values.shape for values in found.values()}) > 1:
        raise ArtifactError(f"'{path}' is damaged: its lists do not have one length.")
    labels, predictions = (
        found[name].astype(np.float64) if name in found else None
        for name in ("labels", "predictions")
    )
    return Answers(
        rows=found["rows"].astype(np.int64),
        losses=found["losses"].astype(np.float64),
        targets=found["targets"].astype(np.int64),
        labels=labels,
        predictions=predictions,
        classes=int(about.get("classes", "0")),
    )


Both = tuple[float, NDArray[np.float64]]


def _of_confusion(
    labels: NDArray[np.float64], predictions: NDArray[np.float64], classes: int, metric: str
) -> Both:
    """f1 or Matthews' correlation; rows of one cell of the confusion matrix are alike."""
    cells = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    matrix = np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.float64)
    formula = _f1 if metric == "f1" else _matthews
    without = np.zeros(classes**2)
    for cell in np.unique(cells):
        less = matrix.copy()
        less.flat[cell] -= 1
        without[cell] = formula(less)
    return formula(matrix), without[cells]


def _f1(matrix: NDArray[np.float64]) -> float:
    """F1 of class 1 of two, else the mean over the classes that occur; rows are the labels."""
    right, all_of = np.diag(matrix), matrix.sum(axis=0) + matrix.sum(axis=1)
    each = 2 * right / np.maximum(all_of, 1)
    return float(each[1]) if len(matrix) == 2 else float(each[all_of > 0].mean())


def _matthews(matrix: NDArray[np.float64]) -> float:
    """Matthews' correlation of any number of classes (Gorodkin 2004); 0 where it is 0/0."""
    total, guessed, true = matrix.sum(), matrix.sum(axis=0), matrix.sum(axis=1)
    above = np.trace(matrix) * total - guessed @ true
    below = (total**2 - guessed @ guessed) * (total**2 - true @ true)
    return float(above / np.sqrt(below)) if below > 0 else 0.0


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> Both:
    """Pearson's correlation: without row i each sum of products loses n/(n − 1) of its term."""
    x, y = x - x.mean(), y - y.mean()
    share = len(x) / (len(x) - 1)

    def ratio(xy: NDArray[np.float64], xx: NDArray[np.float64], yy: NDArray[np.float64]):
        with np.errstate(all="ignore"):
            return xy / np.sqrt(xx * yy)

    sums = [a @ b for a, b in ((x, y), (x, x), (y, y))]
    less = [s - share * a * b for s, a, b in zip(sums, (x, x, y), (y, x, y), strict=True)]
    return float(ratio(*map(np.asarray, sums))), ratio(less[0], less[1], less[2])


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> Both:
    """Spearman's correlation: without row i the rank of every larger value falls by 1."""
    ranks = [_ranks(values) for values in (x, y)]
    without = np.empty(len(x))
    for first in range(0, len(x), _CHUNK):
        part = slice(first, first + _CHUNK)
        left: list[NDArray[np.float64]] = []
        for values, rank in zip((x, y), ranks, strict=True):
            own = values[part, None]
            fall = (own < values[None, :]) + 0.5 * (own == values[None, :])
            left.append(rank[None, :] - fall)
        keep = np.ones_like(left[0])
        rows = np.arange(len(keep))
        keep[rows, first + rows] = 0
        a, b = ((r - (r * keep).sum(1, keepdims=True) / (len(x) - 1)) * keep for r in left)
        with np.errstate(all="ignore"):
            without[part] = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return _pearson(ranks[0], ranks[1])[0], without


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
