"""Tasks with a planted answer: what gradients learn by too large a rank shows the rank there is."""

from __future__ import annotations

import pytest
import torch

from planted import RANKS, SEEDS, learned, planted
from rankwise.lowrank import Factors
from rankwise.spectrum import spectrum


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_gap_of_what_was_learned_is_at_the_planted_rank(noise: float) -> None:
    tasks = [(k, seed) for k in RANKS for seed in SEEDS]
    made = [planted(k, seed, noise) for k, seed in tasks]
    A, B = learned(*(torch.stack(parts) for parts in zip(*made, strict=True)))
    wrong: list[tuple[int, int, int]] = []
    for (k, seed), a, b in zip(tasks, A, B, strict=True):
        gap = spectrum(Factors(a, b, 1.0)).gap
        assert gap is not None
        if gap.k != k:
            wrong.append((k, seed, gap.k))
    assert wrong == []
