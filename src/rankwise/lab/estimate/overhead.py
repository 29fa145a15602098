"""What a process holds besides the model: Python, torch, and the libraries that a run imports."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rankwise.train.memory import resident
from rankwise.train.metrics import score

__all__ = ["of_process"]


def of_process(task: str) -> int:
    """The resident memory of this process, in bytes, once it has used what a run uses.

    It computes a metric and trains a very small layer, so that their libraries are in memory. What
    this process holds of other things is counted too. 0 where the system does not say.
    """
    if task != "causal-lm":
        outputs = np.eye(2, dtype=np.float32)
        score(task, 0.0, outputs if task == "classification" else outputs[0], np.arange(2.0))
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.zeros(1, 4, 16)).sum().backward()
    optimizer.step()
    return resident() or 0
