"""The demo, small: every method runs, the choice is explained, a second call runs nothing anew."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import ArtifactError, UserError
from rankwise.lab import demo as room
from rankwise.lab.demo import Demo, chosen, model_folder, run_demo
from rankwise.lab.findings import findings
from rankwise.lab.records import RunRecord
from rankwise.train.reporter import Silent
from rankwise.train.signals import Interrupted

SMALL = Demo(train_rows=32, heldout_rows=24, epochs=1, ranks=(1, 2))


@pytest.mark.slow
def test_the_whole_demo_and_again(minilm: Path, tmp_path: Path) -> None:
    printed = run_demo(tmp_path / "demo", SMALL, Silent())
    folder = tmp_path / "demo"
    names = ["head-only", "lora-r1", "lora-r2", "lora-all-linear-r8", "full"]
    manifests = {n: json.loads((folder / n / "manifest.json").read_text()) for n in names}
    assert all(m["status"] == "finished" for m in manifests.values())
    data = {json.dumps(m["data"], sort_keys=True) for m in manifests.values()}
    assert len(data) == 1, "every method must see the same rows"
    for r in (1, 2):
        counts = manifests[f"lora-r{r}"]["counts"]
        assert counts["adapter"] == counts["adapter_formula"] == 12 * r * (384 + 384)
    assert json.loads((folder / "merged" / "certificate.json").read_text())["passed"] is True
    assert "merge certificate passed" in printed
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    logs = {n: (folder / n / "metrics.jsonl").stat().st_mtime_ns for n in names}
    assert run_demo(folder, SMALL, Silent()) == printed
    assert {n: (folder / n / "metrics.jsonl").stat().st_mtime_ns for n in names} == logs
    with pytest.raises(UserError, match="other data"):
        run_demo(folder, replace(SMALL, train_rows=33), Silent())


def test_a_demo_that_is_stopped_says_how_it_goes_on(minilm: Path, tmp_path: Path) -> None:
    class Signals(Silent):
        def advance(self, done: int, values: Mapping[str, float]) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="Go on with: the same command") as stopped:
        run_demo(tmp_path, SMALL, Signals())
    assert stopped.value.number == signal.SIGINT
    manifest = json.loads((tmp_path / "head-only" / "manifest.json").read_text())
    assert manifest["status"] != "finished"


def test_the_model_is_checked_by_its_sha256(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_folder() == minilm
    package = tmp_path / "fake_minilm"
    (package / "model").mkdir(parents=True)
    (package / "model" / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(room, "_PACKAGE", "fake_minilm")
    with pytest.raises(ArtifactError, match="sha256"):
        model_folder()


def test_the_report_and_the_demo_choose_alike(
    record: Callable[..., RunRecord], lora: Callable[..., dict[str, Any]]
) -> None:
    runs = [
        record(f"LoRA r={r}", lora(r), accuracy, rows=400)
        for r, accuracy in ((1, 0.71), (4, 0.79), (8, 0.80))
    ]
    assert chosen(runs).method["r"] == 4
    assert "does not beat by more than the noise is LoRA r=4," in "\n".join(findings(runs))
    assert chosen(runs[:1]).method["r"] == 1
    full = record("full", {"method": "full"}, 0.99, rows=400)
    assert chosen([*runs, full]).method["r"] == 4
    with pytest.raises(UserError, match="no update to choose"):
        chosen([full])
