"""Row answers: read back as written, and row by row what the jackknife on real metrics says."""

from pathlib import Path

import numpy as np
import pytest

from rankwise.errors import ArtifactError, UserError
from rankwise.train.answers import Answers, read_answers, write_answers
from rankwise.train.metrics import score


def answers(task: str, count: int = 23, classes: int = 3) -> Answers:
    rng = np.random.default_rng(4)
    rows = np.arange(count)
    losses = rng.exponential(size=count).astype(np.float32).astype(np.float64)
    if task == "causal-lm":
        return Answers(rows, losses, rng.integers(1, 9, count))
    ones = np.ones(count, dtype=np.int64)
    if task == "regression":
        labels = np.round(rng.normal(size=count), 1)  # some are equal
        guessed = np.round(labels + rng.normal(size=count), 1)
        labels, guessed = (v.astype(np.float32).astype(np.float64) for v in (labels, guessed))
        return Answers(rows, losses, ones, labels, guessed)
    labels = rng.integers(0, classes, count).astype(float)
    guessed = np.where(rng.random(count) < 0.6, labels, rng.integers(0, classes, count))
    return Answers(rows, losses, ones, labels, guessed.astype(float), classes)


def of(task: str, given: Answers, rows: np.ndarray) -> dict[str, float]:
    """The metrics of some rows, as the training room computes them."""
    loss = given.losses[rows].sum() / given.targets[rows].sum()
    if given.labels is None or given.predictions is None:
        return dict(score(task, loss))
    outputs = given.predictions[rows]
    if task == "classification":
        outputs = np.eye(given.classes)[outputs.astype(int)]
    return dict(score(task, loss, outputs.astype(np.float32), given.labels[rows]))


@pytest.mark.parametrize(
    ("task", "metric", "classes"),
    [
        *(("classification", m, c) for m in ("accuracy", "f1", "matthews", "loss") for c in (2, 3)),
        *(("regression", m, 0) for m in ("pearson", "spearman", "loss")),
        *(("causal-lm", m, 0) for m in ("perplexity", "loss")),
    ],
)
def test_contributions_are_the_jackknifes(task: str, metric: str, classes: int) -> None:
    given = answers(task, classes=classes)
    count = len(given.rows)
    every = np.arange(count)
    whole = of(task, given, every)[metric]
    left_out = [of(task, given, every[every != i])[metric] for i in every]
    found = given.contributions(metric)
    assert found is not None
    np.testing.assert_allclose(
        found, count * whole - (count - 1) * np.array(left_out), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_contributions_of_a_mean_are_the_rows_own_values(metric: str) -> None:
    given = answers("classification")
    own = given.labels == given.predictions if metric == "accuracy" else given.losses
    found = given.contributions(metric)
    assert found is not None
    np.testing.assert_allclose(found, own, atol=1e-12)


def test_what_cannot_be_told_row_by_row_is_not() -> None:
    one_class = Answers(np.arange(3), np.ones(3), np.ones(3, int), np.ones(3), np.ones(3))
    assert one_class.contributions("pearson") is None
    assert answers("causal-lm").contributions("accuracy") is None
    assert answers("causal-lm").contributions("f1") is None
    assert answers("regression", count=2).contributions("pearson") is None


@pytest.mark.parametrize("task", ["classification", "regression", "causal-lm"])
def test_answers_come_back_as_they_were_written(tmp_path: Path, task: str) -> None:
    given = answers(task)
    path = write_answers(tmp_path / "answers.safetensors", given, "print")
    assert path.stat().st_size < 1000 + 20 * len(given.rows)
    found = read_answers(path, "print")
    for name in ("rows", "losses", "targets", "labels", "predictions"):
        one, two = getattr(given, name), getattr(found, name)
        assert (one is None) == (two is None)
        if one is not None:
            np.testing.assert_array_equal(one, two)
    assert found.classes == given.classes


def test_answers_to_other_rows_are_refused(tmp_path: Path) -> None:
    path = write_answers(tmp_path / "a.safetensors", answers("regression"), "print")
    with pytest.raises(ArtifactError, match="other evaluation data"):
        read_answers(path, "another print")
    with pytest.raises(UserError, match="There is no"):
        read_answers(tmp_path / "b.safetensors", "print")


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(ArtifactError, match="does not hold the answers"):
        read_answers(path, "print")
    names = ("rows", "losses", "targets")
    about = {"kind": "rankwise answers 1", "evaluation": "print"}
    save_file({n: np.ones(3 + (n == "rows")) for n in names}, path, about)
    with pytest.raises(ArtifactError, match="one length"):
        read_answers(path, "print")
