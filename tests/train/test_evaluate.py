from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rankwise.data.encode import encode, padding_id
from rankwise.data.examples import load_examples
from rankwise.errors import EnvironmentFault
from rankwise.train.evaluate import Rows, batch_loss, evaluate, outputs, row_losses, targets_in
from rankwise.train.model import load_base

CPU = torch.device("cpu")
Loaded = tuple[Any, Rows]


@pytest.fixture
def loaded(bert: Path, gpt2: Path, rows: Path) -> Callable[[str], Loaded]:
    """A model and the encoded dev rows of a task."""

    def make(task: str) -> Loaded:
        source = gpt2 if task == "causal-lm" else bert
        ends = {
            "classification": ".tsv",
            "regression": "-scores.tsv",
            "causal-lm": "-prompts.jsonl",
        }
        examples = load_examples(rows / f"dev{ends[task]}", task)  # type: ignore[arg-type]
        base = load_base(str(source), task, examples.label_names)
        encoded = encode(examples, base.tokenizer, 64)
        return base.model, Rows(encoded, task, padding_id(base.tokenizer), CPU)

    return make


@pytest.mark.parametrize("task", ["classification", "regression", "causal-lm"])
def test_the_loss_is_transformers_own(loaded: Callable[[str], Loaded], task: str) -> None:
    model, rows = loaded(task)
    indices = [0, 3, 4, 9, 20]
    batch = rows.batch(indices)
    with torch.no_grad():
        total = batch_loss(model, batch, task)
        _, logits = row_losses(model, batch, task)
        theirs = model(**batch)
    count = targets_in(rows.encoded, indices, task)
    torch.testing.assert_close(total / count, theirs.loss, rtol=1e-6, atol=0)
    assert (logits is None) == (task == "causal-lm")
    assert logits is None or torch.equal(logits, theirs.logits)
    if task == "causal-lm":
        assert count == int((batch["labels"][:, 1:] != -100).sum())
        assert 0 < count < int(batch["attention_mask"].sum())


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_outputs_come_in_row_order_however_they_are_batched(
    loaded: Callable[[str], Loaded], task: str, batch_size: int
) -> None:
    model, rows = loaded(task)
    found, loss = outputs(model, rows, batch_size)
    assert found is not None
    assert found.shape == ((21, 2) if task == "classification" else (21,))
    singly: list[np.ndarray] = []
    losses: list[float] = []
    for i in range(21):
        ids = torch.tensor([rows.encoded.input_ids[i]])
        with torch.no_grad():
            row = model(input_ids=ids, labels=rows.batch([i])["labels"])
        singly.append(row.logits[0].numpy())
        losses.append(row.loss.item())
    np.testing.assert_allclose(found.reshape(21, -1), np.stack(singly), rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_perplexity_is_over_all_target_tokens(loaded: Callable[[str], Loaded]) -> None:
    model, rows = loaded("causal-lm")
    with torch.no_grad():
        logits = model(
            **{k: v for k, v in rows.batch(list(range(21))).items() if k != "labels"}
        ).logits
    labels = rows.batch(list(range(21)))["labels"]
    logs = logits[:, :-1].double().log_softmax(-1)
    kept = labels[:, 1:] != -100
    picked = logs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0][kept]
    found = evaluate(model, rows, 5)
    assert found["loss"] == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(-picked.mean().item()), rel=1e-5)


def test_rows_without_labels_have_outputs_and_no_loss(loaded: Callable[[str], Loaded]) -> None:
    from dataclasses import replace

    model, rows = loaded("classification")
    bare = replace(rows, encoded=replace(rows.encoded, labels=None))
    with_labels, _ = outputs(model, rows, 8)
    without, loss = outputs(model, bare, 8)
    assert with_labels is not None
    assert without is not None
    assert np.array_equal(with_labels, without)
    assert np.isnan(loss)


def test_the_mode_is_put_back_and_dropout_is_off(loaded: Callable[[str], Loaded]) -> None:
    model, rows = loaded("classification")
    model.train()
    first, _ = outputs(model, rows, 8)
    assert model.training
    model.eval()
    second, _ = outputs(model, rows, 8)
    assert not model.training
    assert first is not None
    assert second is not None
    assert np.array_equal(first, second)


def test_metrics_are_those_of_the_outputs(loaded: Callable[[str], Loaded]) -> None:
    model, rows = loaded("classification")
    found, loss = outputs(model, rows, 8)
    assert found is not None
    right = found.argmax(1) == np.asarray(rows.encoded.labels)
    metrics = evaluate(model, rows, 8)
    assert metrics["accuracy"] == pytest.approx(right.mean())
    assert metrics["loss"] == loss


class Small(nn.Module):
    """A model that runs out of memory with more than so many rows."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most, self.sizes = model, most, list[int]()

    def forward(self, **batch: torch.Tensor) -> Any:
        size = len(batch["input_ids"])
        if size > self.most:
            raise torch.OutOfMemoryError("no memory")
        self.sizes.append(size)
        return self.model(**batch)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_batch_that_does_not_fit_is_cut_in_half(
    loaded: Callable[[str], Loaded], task: str
) -> None:
    model, rows = loaded(task)
    small = Small(model, 3)
    found, loss = outputs(small, rows, 16)
    wanted, whole = outputs(model, rows, 16)
    assert sum(small.sizes) == 21
    assert max(small.sizes) <= 3
    assert loss == pytest.approx(whole, rel=1e-6)
    if found is not None and wanted is not None:
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_single_row_that_does_not_fit(loaded: Callable[[str], Loaded]) -> None:
    model, rows = loaded("classification")
    with pytest.raises(EnvironmentFault, match=r"single row.*--max-length"):
        outputs(Small(model, 0), rows, 16)


def test_other_errors_are_not_taken_for_a_lack_of_memory(loaded: Callable[[str], Loaded]) -> None:
    _, rows = loaded("classification")

    def broken(**_: torch.Tensor) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    class Broken(nn.Module):
        forward = staticmethod(broken)

    with pytest.raises(RuntimeError, match="shapes cannot"):
        outputs(Broken(), rows, 16)
