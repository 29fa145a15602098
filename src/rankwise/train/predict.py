"""Predictions of a run's model: labels and probabilities, scores, or generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from rankwise.data.encode import encode, padding_id
from rankwise.data.examples import Examples, load_examples
from rankwise.errors import UserError
from rankwise.train.evaluate import Rows, evaluate, outputs
from rankwise.train.generation import Generation, generate
from rankwise.train.metrics import score
from rankwise.train.precision import choose_device
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.restore import Restored
from rankwise.train.setup import column_names

__all__ = ["Generation", "Predictions", "examples_of_file", "examples_of_text", "predict"]


@dataclass(frozen=True)
class Predictions:
    """One record for each row, in order, and the metrics where rows have labels.

    Attributes:
        rows: the records; ``row`` counts the rows of the source from 1.
        metrics: over the rows that have a label or a completion, None where none has.
        measured: how many rows the metrics are over.
    """

    rows: list[dict[str, Any]]
    metrics: Mapping[str, float] | None
    measured: int = 0


def examples_of_text(run: Restored, texts: Sequence[str], pairs: Sequence[str]) -> Examples:
    """Examples from texts given by hand, for this run's task.

    Raises:
        UserError: an empty text; a pair task without second texts, or the other way round.
    """
    task, form = run.manifest["task"], run.manifest["form"]
    wants_pair = form == "pair"
    if wants_pair and len(pairs) != len(texts):
        raise UserError("This run reads two texts a row: give one --pair for each --text.")
    if pairs and not wants_pair:
        raise UserError("This run reads one text a row; leave --pair out.")
    if any(not text.strip() for text in texts):
        raise UserError("--text is empty; there is nothing to predict from.")
    lines = list(range(1, len(texts) + 1))
    if task != "causal-lm":
        return Examples(task, "--text", lines, texts=list(texts), pairs=list(pairs) or None)
    if form == "messages":
        chats = [[{"role": "user", "content": text}] for text in texts]
        return Examples(task, "--text", lines, messages=chats)
    if form == "prompt":
        return Examples(task, "--text", lines, prompts=[(text, "") for text in texts])
    return Examples(task, "--text", lines, texts=list(texts))


def examples_of_file(run: Restored, path: str, limit: int | None = None) -> Examples:
    """Examples from a file, with or without labels, for this run's task."""
    config = run.config
    examples = load_examples(
        path,
        run.manifest["task"],
        column_names(config),
        label_names=run.manifest["label_names"] or None,
        limit=limit,
        require_labels=False,
        fallback=True,
    )
    if examples.form != run.manifest["form"]:
        raise UserError(
            f"{path} holds rows of the form '{examples.form}', and this run was trained on "
            f"'{run.manifest['form']}'."
        )
    return examples


def predict(
    run: Restored,
    examples: Examples,
    *,
    batch_size: int = 64,
    device: str = "auto",
    generation: Generation | None = None,
    reporter: Reporter | None = None,
) -> Predictions:
    """Predict every row with a run's model.

    Classification gives ``label`` and ``probabilities``, regression ``score``, a language model
    ``generated``. Rows with labels also give metrics; a language model is then measured by the
    perplexity of the given completions. No row is left out of the predictions.
    """
    watcher = reporter or Silent()
    for note in examples.notes:
        watcher.note(note)
    where = choose_device(device)
    run.base.model.to(where)  # type: ignore[arg-type]
    if run.manifest["task"] == "causal-lm":
        made = generate(run, examples, batch_size, where, generation or Generation(), watcher)
        rows = [{"row": i + 1, "generated": text} for i, text in enumerate(made)]
        return _with_perplexity(run, examples, rows, batch_size, where, watcher)
    return _labelled(run, examples, batch_size, where, watcher)


def _labelled(
    run: Restored, examples: Examples, batch_size: int, device: torch.device, watcher: Reporter
) -> Predictions:
    task = run.manifest["task"]
    encoded = encode(examples, run.base.tokenizer, run.max_length)
    for note in encoded.notes:
        watcher.note(note)
    bare = Rows(replace(encoded, labels=None), task, padding_id(run.base.tokenizer), device)
    values, _ = outputs(run.base.model, bare, batch_size, watcher)
    if values is None:  # pragma: no cover - only language models keep no outputs
        raise AssertionError(task)
    rows = _records(values, run.manifest["label_names"], task)
    if examples.labels is None:
        return Predictions(rows, None)
    kept = [i for i in range(len(examples)) if i not in examples.unlabelled]
    labels = np.asarray(examples.labels, dtype=np.float64)[kept]
    values = values[kept]
    loss = _mean_loss(task, values, labels)
    return Predictions(rows, score(task, loss, values, labels), len(kept))


def _mean_loss(task: str, values: NDArray[np.float32], labels: NDArray[np.float64]) -> float:
    """The loss of training, its mean over rows."""
    found, wanted = torch.from_numpy(values).double(), torch.from_numpy(labels)
    if task == "regression":
        return F.mse_loss(found, wanted).item()
    return F.cross_entropy(found, wanted.long()).item()


def _with_perplexity(
    run: Restored,
    examples: Examples,
    rows: list[dict[str, Any]],
    batch_size: int,
    device: torch.device,
    watcher: Reporter,
) -> Predictions:
    """The records of a language model with the metrics over the rows that hold a completion."""
    kept = _rows_with_targets(examples)
    if not kept:
        return Predictions(rows, None)
    if len(kept) < len(examples):
        watcher.note(
            f"{examples.source}: {len(kept)} of {len(examples)} rows hold a completion; the "
            "metrics are over these."
        )
    tokenizer = run.base.tokenizer
    try:
        encoded = encode(examples.subset(kept), tokenizer, run.max_length)
    except UserError as error:  # no completion within the length: what was generated still counts
        watcher.note(f"There are no metrics. {error}")
        return Predictions(rows, None)
    for note in encoded.notes:
        watcher.note(note)
    measured = Rows(encoded, "causal-lm", padding_id(tokenizer), device)
    return Predictions(rows, evaluate(run.base.model, measured, batch_size, watcher), len(encoded))


def _records(values: NDArray[np.float32], names: Sequence[str], task: str) -> list[dict[str, Any]]:
    if task == "regression":
        return [{"row": i + 1, "score": float(v)} for i, v in enumerate(values)]
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    shares = shifted / shifted.sum(axis=1, keepdims=True)
    return [
        {
            "row": i + 1,
            "label": names[int(row.argmax())],
            "probabilities": {n: round(float(p), 6) for n, p in zip(names, row, strict=True)},
        }
        for i, row in enumerate(shares)
    ]


def _rows_with_targets(examples: Examples) -> list[int]:
    """The rows that say what a language model should have answered."""
    if examples.prompts is not None:
        return [i for i, (_, completion) in enumerate(examples.prompts) if completion]
    if examples.messages is not None:
        last = [chat[-1]["role"] for chat in examples.messages]
        return [i for i, role in enumerate(last) if role == "assistant"]
    return list(range(len(examples))) if examples.source != "--text" else []
