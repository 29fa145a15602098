"""`rankwise fit` and transformers.Trainer with PEFT, both with their defaults, to one accuracy."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from rankwise.data.examples import ColumnNames, Examples, load_examples
from rankwise.data.pydocs import docstrings
from rankwise.lab.demo import model_folder
from rankwise.train.config import make_config
from rankwise.train.run import fit
from rankwise.train.setup import Data

__all__ = ["rows"]

SIZE, HELD = 1000, 400


def rows(sst2: Path | None) -> Iterator[dict[str, Any]]:
    """A row for the demo's data, and one for SST-2 where its folder is given."""
    train, held = docstrings(0, SIZE, HELD)
    yield _row("docstrings of Python's library", Data(train, held))
    if sst2 is not None:
        load = (sst2 / "train.tsv", SIZE), (sst2 / "dev.tsv", HELD)
        train, held = (
            load_examples(str(path), "classification", ColumnNames(), limit=n) for path, n in load
        )
        yield _row("SST-2", Data(train, held))


def _row(name: str, data: Data) -> dict[str, Any]:
    accuracy, theirs = _trainer(data.train, data.held)
    ours, reached = _ours(data, accuracy)
    return {
        "measure": "fit to the accuracy of Trainer + PEFT, each with its defaults: PEFT / ours",
        "on": f"MiniLM, {SIZE:,} rows of {name}",
        "ratio": [theirs / ours] * 3,
        "seconds": {"peft": theirs, "ours": ours},
        "accuracy": {"peft": accuracy, "ours, then": reached},
    }


def _trainer(train: Examples, held: Examples) -> tuple[float, float]:
    """The accuracy after Trainer's own number of epochs, and the seconds of its training."""
    torch.manual_seed(0)
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(train.label_names)
    )
    model: Any = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS"))

    def encoded(examples: Examples) -> list[dict[str, Any]]:
        made = tokenizer(examples.texts, truncation=True, max_length=256)
        labels = examples.labels or []
        return [
            {**{k: v[i] for k, v in made.items()}, "labels": int(label)}
            for i, label in enumerate(labels)
        ]

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model,
            TrainingArguments(out, report_to=[], save_strategy="no", disable_tqdm=True),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=encoded(train),  # type: ignore[arg-type]
        )
        start = time.perf_counter()
        trainer.train()
        took = time.perf_counter() - start
        found = trainer.predict(encoded(held))  # type: ignore[arg-type]
    return float(np.mean(found.predictions.argmax(-1) == found.label_ids)), took


def _ours(data: Data, accuracy: float) -> tuple[float, float]:
    """Seconds of training until the accuracy is first reached, looked at every fifth step."""
    with tempfile.TemporaryDirectory() as out:
        values = {"model": str(model_folder()), "data": "memory", "out": f"{out}/run"}
        config = make_config({**values, "metric": "accuracy", "eval_every": 5}, "benchmark")
        fit(config, data=data)
        log = (Path(out) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = 0.0
    for row in map(json.loads, log):
        seconds = row.get("seconds", seconds)
        if row["event"] == "eval" and row["accuracy"] >= accuracy:
            return seconds, row["accuracy"]
    return float("nan"), max(r["accuracy"] for r in map(json.loads, log) if r["event"] == "eval")
