"""One small comparison that was really run, for tests that only read it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.lab.compare.evidence import Evidence
from rankwise.lab.compare.running import run_compare

SMALL = {"methods": "head,lora", "ranks": "1,2", "seeds": 2, "widen": 0, "search_rank": 2}


@pytest.fixture(scope="session")
def given(bert: Path, rows: Path) -> Callable[..., dict[str, Any]]:
    """The options of fit for a quick comparison."""

    def make(**more: Any) -> dict[str, Any]:
        files = {"data": str(rows / "train.tsv"), "eval": str(rows / "dev.tsv")}
        return {"model": str(bert), **files, "device": "cpu", "epochs": 1, "batch_size": 8, **more}

    return make


@pytest.fixture(scope="session")
def compared(
    tmp_path_factory: pytest.TempPathFactory, given: Callable[..., dict[str, Any]]
) -> Evidence:
    """A comparison of the head and LoRA at two ranks, two seeds each, with a search."""
    return run_compare(tmp_path_factory.mktemp("compare") / "small", given(), SMALL, jobs=2)
