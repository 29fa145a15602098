"""The usual metrics of each task, by scikit-learn and SciPy, and which one picks the best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import EnvironmentFault, UserError, nearest

__all__ = ["METRICS", "better", "main_metric", "score"]

# The metrics of each task; the first picks the best adapter unless another is named.
METRICS = {
    "classification": ("accuracy", "f1", "matthews", "loss"),
    "regression": ("pearson", "spearman", "loss"),
    "causal-lm": ("perplexity", "loss"),
}
_LOWER_IS_BETTER = ("loss", "perplexity")


def main_metric(task: str, named: str | None) -> str:
    """The metric that picks the best adapter.

    Raises:
        UserError: the named metric is none of this task's.
        EnvironmentFault: the libraries that compute the task's metrics are not installed, which
            is better known before the training than after it.
    """
    if task != "causal-lm":
        _libraries()
    if named is None:
        return METRICS[task][0]
    if named not in METRICS[task]:
        raise UserError(
            f"--metric {named} is no metric of {task}; there are: {', '.join(METRICS[task])}."
            f"{nearest(named, METRICS[task])}"
        )
    return named


def better(metric: str, new: float, old: float | None) -> bool:
    """Whether ``new`` is better than ``old``; a number is better than none or NaN."""
    if math.isnan(new):
        return False
    if old is None or math.isnan(old):
        return True
    return new < old if metric in _LOWER_IS_BETTER else new > old


def score(
    task: str,
    loss: float,
    outputs: NDArray[np.float32] | None = None,
    labels: NDArray[np.float64] | None = None,
) -> Mapping[str, float]:
    """The metrics of an evaluation.

    Args:
        loss: mean loss; over rows, or over target tokens for a language model.
        outputs: logits (rows, classes), or predictions (rows,) for regression.
        labels: class numbers or scores (rows,).

    Returns accuracy, f1 (of class 1 for two classes, else the mean over classes) and Matthews'
    correlation; Pearson's and Spearman's correlation (NaN when either side is constant); or
    perplexity exp(loss); and the loss.
    """
    if task == "causal-lm":
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss}
    if outputs is None or labels is None:
        raise ValueError(f"{task} needs outputs and labels")
    stats, metrics = _libraries()
    if task == "regression":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            pearson = (
                float(stats.pearsonr(outputs, labels).statistic) if len(labels) > 1 else math.nan
            )
            spearman = float(stats.spearmanr(outputs, labels).statistic)
        return {"pearson": pearson, "spearman": spearman, "loss": loss}
    predicted = outputs.argmax(axis=1)
    average = "binary" if outputs.shape[1] == 2 else "macro"
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1": float(metrics.f1_score(labels, predicted, average=average, zero_division=0.0)),
        "matthews": float(metrics.matthews_corrcoef(labels, predicted)),
        "loss": loss,
    }


def _libraries() -> tuple[Any, Any]:
    """SciPy's statistics and scikit-learn's metrics; Any, as their stubs lag behind their code."""
    try:
        import scipy.stats
        import sklearn.metrics
    except ImportError as error:
        raise EnvironmentFault(
            "Metrics need scikit-learn, which is not installed. "
            'Install it with: pip install "rankwise[text]"'
        ) from error
    return scipy.stats, sklearn.metrics
