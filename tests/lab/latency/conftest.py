"""A small measurement, made once, and one written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankwise.lab.latency import LatencyRecord, Sameness, Sizes, Timing, Variant, run_latency
from rankwise.train.config import FitConfig, make_config


def options(folder: Path, **more: Any) -> FitConfig:
    values = {"model": str(folder), "data": "", "out": "", "dtype": "float32", "device": "cpu"}
    return make_config(values | more, "test")


@pytest.fixture(scope="session")
def measured(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LatencyRecord, Path]:
    """BERT of two layers at two sizes, and the folder that was written."""
    out = tmp_path_factory.mktemp("latency") / "out"
    sizes = Sizes((1, 2), (8,), rounds=3)
    return run_latency(options(bert), sizes, out), out


@pytest.fixture
def written() -> LatencyRecord:
    """Times whose ratios are known: LoRA takes half as long again in each round."""
    plain = (1.0, 2.0, 4.0, 1.0, 1.0)
    return LatencyRecord(
        model="small",
        task="classification",
        sizes=Sizes((4,), (16,), rounds=5),
        options={"r": 8},
        variants=(
            Variant("plain", 0, 10, 100),
            Variant("merged", 0, 10, 100),
            Variant("LoRA, unmerged", 64, 14, 120),
        ),
        sameness=Sameness(True, True, True, True, 1e-7, 1e-5, 1e-3),
        timings=(
            Timing("plain", 4, 16, plain),
            Timing("merged", 4, 16, tuple(1.01 * x for x in plain)),
            Timing("LoRA, unmerged", 4, 16, tuple(1.5 * x for x in plain)),
        ),
    )
