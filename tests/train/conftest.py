"""A training loop on tiny rows, its model always the same at the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.attaching import attach
from rankwise.data.encode import encode, padding_id
from rankwise.data.examples import load_examples
from rankwise.methods.lora import LoRA
from rankwise.train.config import FitConfig
from rankwise.train.evaluate import Rows
from rankwise.train.loop import Loop
from rankwise.train.model import load_base

CPU = torch.device("cpu")
Make = Callable[..., Loop]


@pytest.fixture
def make(
    tmp_path: Path, options: Callable[..., FitConfig], gpt2: Path, rows: Path, witness: Any
) -> Make:
    """A loop over the labelled sentences or the prompts, its model always the same at the start."""
    count = iter(range(100))

    def build(task: str = "classification", dropout: float = 0.0, **more: Any) -> Loop:
        out = tmp_path / f"run{next(count)}"
        out.mkdir()
        if task == "causal-lm":
            files = {
                n: str(rows / f"{f}-prompts.jsonl") for n, f in (("data", "train"), ("eval", "dev"))
            }
            more = {"model": str(gpt2), "task": task, **files, **more}
        config = options(out, **more)
        torch.manual_seed(0)
        train = load_examples(config.data, config.task)
        held = load_examples(str(config.eval), config.task, label_names=train.label_names or None)
        base = load_base(config.model, train.task, train.label_names)
        both = [
            Rows(encode(e, base.tokenizer, 64), e.task, padding_id(base.tokenizer), CPU)
            for e in (train, held)
        ]
        for module in base.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        attach(base.model, LoRA(r=2, dropout=dropout))
        with torch.no_grad():  # with B at zero, A would have no gradient in the first step
            for name, parameter in base.model.named_parameters():
                if name.endswith("lora_B"):
                    nn.init.normal_(parameter, std=0.1)
        metric = "accuracy" if train.task == "classification" else "perplexity"
        saved = [0]
        loop = Loop(
            base.model, both[0], both[1], config, metric, out, lambda _: saved.append(1), witness
        )
        return loop

    return build
