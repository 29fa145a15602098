"""Adapters tried on one base: each gives its run's own scores, and the base is bare after each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.attaching import attached
from rankwise.errors import UserError
from rankwise.io.peft_alone import read_peft_alone
from rankwise.train.manifest import read_manifest
from rankwise.train.reporter import Silent
from rankwise.train.trying import bench_of_model, bench_of_run


def test_a_runs_adapter_has_the_runs_scores(
    finished: Callable[[str], Path], rows: Path, look: Any
) -> None:
    run = finished("single")
    bench = bench_of_run(str(run), str(rows / "dev.tsv"))
    before = {k: t.clone() for k, t in bench.base.model.state_dict().items()}
    own = read_peft_alone(run / "adapter").adapter
    first, second = bench.tried([own, own], Silent())
    assert first.metrics == pytest.approx(read_manifest(run)["metrics"], rel=1e-5)
    assert first.metrics == second.metrics
    assert not attached(bench.base.model)
    after = bench.base.model.state_dict()
    assert all(torch.equal(t, after[k]) for k, t in before.items())


def test_without_a_run_the_classes_are_those_of_the_data(
    finished: Callable[[str], Path], bert: Path, rows: Path
) -> None:
    run = finished("single")
    bench = bench_of_model(str(bert), str(rows / "dev.tsv"))
    (found,) = bench.tried([read_peft_alone(run / "adapter").adapter], Silent())
    assert found.metrics == pytest.approx(read_manifest(run)["metrics"], rel=1e-5)


def test_rows_without_labels_are_refused(
    finished: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    lines = (rows / "dev.tsv").read_text().splitlines()
    bare = tmp_path / "bare.tsv"
    bare.write_text("\n".join(line.partition("\t")[0] for line in lines))
    with pytest.raises(UserError, match="rows without labels"):
        bench_of_run(str(finished("single")), str(bare))
