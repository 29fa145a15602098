"""Predictions of a run's model: labels and probabilities, scores, or generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.data.batches import BatchPlan, collate
from rankwise.data.encode import encode, encode_prompts, padding_id
from rankwise.data.examples import ColumnNames, Examples, load_examples
from rankwise.errors import UserError
from rankwise.train.evaluate import Rows, evaluate, outputs
from rankwise.train.metrics import score
from rankwise.train.precision import choose_device
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.restore import Restored

__all__ = ["Generation", "Predictions", "examples_of_file", "examples_of_text", "predict"]


@dataclass(frozen=True)
class Generation:
    """How a language model continues a prompt.

    Attributes:
        max_new_tokens: the longest continuation; at most half of what the model takes.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: of the drawing.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Predictions:
    """One record for each row, in order, and the metrics where the rows have labels."""

    rows: list[dict[str, Any]]
    metrics: Mapping[str, float] | None


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
    columns = ColumnNames(
        text=config.text_column,
        pair=config.pair_column,
        label=config.label_column,
        prompt=config.prompt_column,
        completion=config.completion_column,
        messages=config.messages_column,
    )
    examples = load_examples(
        path,
        run.manifest["task"],
        columns,
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
    perplexity of the given completions.
    """
    watcher = reporter or Silent()
    where = choose_device(device)
    model: Any = run.base.model
    model.to(where)
    task = run.manifest["task"]
    pad = padding_id(run.base.tokenizer)
    if task == "causal-lm":
        made = _generate(run, examples, batch_size, where, generation, watcher)
        rows = [{"row": i + 1, "generated": text} for i, text in enumerate(made)]
        if not _has_targets(examples):
            return Predictions(rows, None)
        encoded = encode(examples, run.base.tokenizer, run.max_length)
        return Predictions(rows, evaluate(model, Rows(encoded, task, pad, where), batch_size))
    encoded = encode(examples, run.base.tokenizer, run.max_length)
    for note in encoded.notes:
        watcher.note(note)
    values, loss = outputs(model, Rows(encoded, task, pad, where), batch_size, watcher)
    if values is None:  # pragma: no cover - only language models keep no outputs
        raise AssertionError(task)
    rows = _records(values, run.manifest["label_names"], task)
    if examples.labels is None:
        return Predictions(rows, None)
    labels = np.asarray(examples.labels, dtype=np.float64)
    return Predictions(rows, score(task, loss, values, labels))


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


def _has_targets(examples: Examples) -> bool:
    if examples.prompts is not None:
        return all(completion for _, completion in examples.prompts)
    if examples.messages is not None:
        return all(chat[-1]["role"] == "assistant" for chat in examples.messages)
    return examples.source != "--text"


def _generate(
    run: Restored,
    examples: Examples,
    batch_size: int,
    device: torch.device,
    generation: Generation | None,
    watcher: Reporter,
) -> list[str]:
    """Continuations in row order; prompts are padded on the left, in batches of like length."""
    how = generation or Generation()
    tokenizer: Any = run.base.tokenizer
    model: Any = run.base.model
    longest, most = run.base.longest, how.max_new_tokens
    if longest is not None and most > longest // 2:
        most = max(1, longest // 2)
        watcher.note(f"The model takes {longest} tokens in all; at most {most} are generated.")
    room = run.max_length if longest is None else min(run.max_length, longest - most)
    encoded = encode_prompts(examples, tokenizer, room)
    for note in encoded.notes:
        watcher.note(note)
    plan = BatchPlan(encoded.lengths, batch_size, shuffle=False)
    made: dict[int, str] = {}
    torch.manual_seed(how.seed)
    options: dict[str, Any] = {"do_sample": how.temperature > 0}
    if how.temperature > 0:
        options["temperature"] = how.temperature
    watcher.start("generating", len(encoded))
    for indices in plan.epoch(0):
        batch = collate(encoded, indices, padding_id(tokenizer), side="left")
        length = batch["input_ids"].shape[1]
        with torch.no_grad():
            tokens = model.generate(
                **{k: v.to(device) for k, v in batch.items() if k != "token_type_ids"},
                max_new_tokens=most,
                pad_token_id=padding_id(tokenizer),
                **options,
            )
        texts = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
        made.update(zip(indices, texts, strict=True))
        watcher.advance(len(made), {})
    watcher.finish()
    return [made[i] for i in range(len(encoded))]
