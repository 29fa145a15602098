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

    It computes a metric and trains a very small layer, so that their libraries are in memory. It
    is a part of the estimate for a fresh process; one that holds other things counts them too.
    0 where the system does not say.
    """
    labels = np.array([0.0, 1.0])
    if task != "causal-lm":
        outputs = np.eye(2, dtype=np.float32) if task == "classification" else np.float32([0, 1])
        score(task, 0.0, outputs, labels)
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.zeros(1, 4, 16)).sum().backward()
    optimizer.step()
    return resident() or 0
