import math
import sys

import numpy as np
import pytest

from rankwise.errors import EnvironmentFault, UserError
from rankwise.train.metrics import METRICS, better, main_metric, score

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
LABELS = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], dtype=np.float64)
CHOSEN = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])


def logits(chosen: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[chosen]


def test_two_classes_against_the_formulas() -> None:
    found = score("classification", 0.5, logits(CHOSEN, 2), LABELS)
    tp, fp, fn, tn = 3, 1, 2, 4
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / math.sqrt(spread))
    assert found["loss"] == 0.5


def test_more_classes_take_the_mean_of_their_f1() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2], dtype=np.float64)
    chosen = np.array([0, 1, 1, 1, 2, 0])
    found = score("classification", 0.0, logits(chosen, 3), labels)
    by_class = [2 * 1 / (2 + 1 + 1), 2 * 2 / (4 + 1 + 0), 2 * 1 / (2 + 0 + 1)]
    assert found["f1"] == pytest.approx(sum(by_class) / 3)
    assert found["accuracy"] == pytest.approx(4 / 6)


def test_a_class_that_is_never_predicted_is_no_warning() -> None:
    found = score("classification", 0.0, logits(np.zeros(10, dtype=int), 2), LABELS)
    assert found == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0, "loss": 0.0}


def test_regression_against_numpy_and_ranks() -> None:
    draw = np.random.default_rng(0)
    labels = draw.normal(size=50)
    predicted = (labels + draw.normal(size=50)).astype(np.float32)
    found = score("regression", 1.0, predicted, labels)
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, labels)[0, 1], abs=1e-6)
    ranks = np.stack([np.argsort(np.argsort(x)) for x in (predicted, labels)])
    assert found["spearman"] == pytest.approx(np.corrcoef(ranks).item(1), abs=1e-9)


@pytest.mark.parametrize("rows", [1, 5])
def test_constant_predictions_have_no_correlation(rows: int) -> None:
    found = score("regression", 1.0, np.ones(rows, np.float32), np.arange(rows, dtype=float))
    assert math.isnan(found["pearson"])
    assert math.isnan(found["spearman"])


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert score("causal-lm", math.log(7.0)) == pytest.approx(
        {"perplexity": 7.0, "loss": 1.9459101}
    )
    assert score("causal-lm", 1e4)["perplexity"] == math.inf


def test_scores_need_outputs_and_labels() -> None:
    with pytest.raises(ValueError, match="needs outputs"):
        score("regression", 0.0)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "pearson", "spearman"])
def test_higher_is_better(metric: str) -> None:
    assert better(metric, 0.6, 0.5)
    assert not better(metric, 0.5, 0.6)


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_lower_is_better(metric: str) -> None:
    assert better(metric, 0.5, 0.6)
    assert not better(metric, 0.6, 0.5)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_first_of_equals_stays_and_a_number_beats_none(metric: str) -> None:
    assert not better(metric, 0.5, 0.5)
    assert better(metric, 0.5, None)
    assert better(metric, 0.5, math.nan)
    assert not better(metric, math.nan, 0.5)
    assert not better(metric, math.nan, None)


def test_the_metric_that_picks_the_best() -> None:
    assert {task: main_metric(task, None) for task in METRICS} == {
        "classification": "accuracy",
        "regression": "pearson",
        "causal-lm": "perplexity",
    }
    assert main_metric("classification", "f1") == "f1"
    with pytest.raises(UserError, match=r"no metric of classification.*Did you mean 'accuracy'"):
        main_metric("classification", "acuracy")
    with pytest.raises(UserError, match="no metric of regression"):
        main_metric("regression", "accuracy")


@pytest.mark.parametrize("missing", ["scipy.stats", "sklearn.metrics"])
def test_a_missing_library_is_told_before_the_training(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for task in ("classification", "regression"):
        with pytest.raises(EnvironmentFault, match=r"rankwise\[text\]"):
            main_metric(task, None)
    assert main_metric("causal-lm", None) == "perplexity"
