"""A comparison, run: nothing twice, nothing lost, and what cannot be run is told at once."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from rankwise.errors import UserError
from rankwise.lab.compare.folder import begin
from rankwise.lab.compare.running import _jobs, _State, report_compare, run_compare
from rankwise.train.reporter import Silent
from rankwise.train.signals import Interrupted


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("manifest.json")}


def test_every_run_is_there_and_finished(compared):
    folder = compared.pinned.folder
    found = [json.loads((p / "manifest.json").read_text()) for p in (folder / "runs").iterdir()]
    assert len(found) == 3 * 2  # the head and LoRA at two ranks, two seeds each
    assert {m["status"] for m in found} == {"finished"}
    assert len({json.dumps(m["data"]["train"], sort_keys=True) for m in found}) == 1
    assert {m["data"]["eval"]["rows"] for m in found} == {21}
    alike = ("epochs", "batch_size", "warmup", "weight_decay", "select")
    assert all({m["config"][k] for m in found} == {found[0]["config"][k]} for k in alike)
    searched = sorted(p.name for p in (folder / "search").iterdir())
    assert searched == sorted(
        [
            *(f"head-lr{rate:g}" for rate in (1e-3, 3e-3, 1e-2)),
            *(f"lora-r2-lr{rate:g}" for rate in (3e-4, 1e-3, 3e-3)),  # for all ranks
        ]
    )


def test_no_evaluation_row_took_part_in_the_search(compared):
    parts = compared.pinned.parts
    for run in (compared.pinned.folder / "search").iterdir():
        data = json.loads((run / "manifest.json").read_text())["data"]
        assert data["train"]["fingerprint"] == parts["search-train"].fingerprint
        assert data["eval"]["fingerprint"] == parts["search-eval"].fingerprint


def test_a_second_call_runs_nothing_and_writes_the_same_page(compared, tmp_path, witness):
    folder = tmp_path / "copy"
    shutil.copytree(compared.pinned.folder, folder, copy_function=shutil.copy2)
    page, before = compared.report.read_bytes(), stamps(folder)
    (folder / "report.html").unlink()
    again = run_compare(folder, {}, {}, reporter=witness)
    assert again.report.read_bytes() == page
    assert stamps(folder) == before
    assert again.summary() == compared.summary()
    assert not [note for note in witness.notes if "are left" in note]


def test_it_grows_by_what_is_new(compared, tmp_path, witness):
    folder = tmp_path / "copy"
    shutil.copytree(compared.pinned.folder, folder, copy_function=shutil.copy2)
    before = stamps(folder)
    grown = run_compare(folder, {}, {"seeds": 3, "methods": "lora"}, jobs=1, reporter=witness)
    after = stamps(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 3
    assert len(grown.runs) == 9
    assert witness.notes[0].startswith("3 of 15 runs are left, searches included; 1 at a time")


def test_a_report_may_have_another_reference_and_trains_nothing(compared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(compared.pinned.folder, folder, copy_function=shutil.copy2)
    before = stamps(folder)
    assert report_compare(folder, "lora-r1").reference == "LoRA r=1"
    assert report_compare(folder).reference is None  # it was for that report alone
    with pytest.raises(UserError, match="--reference full is none of what is compared"):
        report_compare(folder, "full")
    assert stamps(folder) == before


def test_the_first_search_does_not_bound_the_jobs(given, tmp_path, witness):
    compared = {"methods": "head,lora", "ranks": "1,2,4,8", "seeds": 1, "widen": 0, "rates": 3}
    made = begin(tmp_path / "out", given(max_steps=1), compared, witness)
    state = _State(made, witness)
    assert len(state.left()) == 3  # the head's search alone
    assert _jobs(8, 0, made, state.to_go, witness) == 8


def test_a_clone_that_kept_the_records_alone_goes_on(compared, tmp_path):
    folder = tmp_path / "clone"
    left_out = shutil.ignore_patterns("data", "logs", "adapter", "config.yaml", "*.lock")
    shutil.copytree(compared.pinned.folder, folder, ignore=left_out, copy_function=shutil.copy2)
    before = stamps(folder)
    again = run_compare(folder, {}, {})
    assert again.report.read_bytes() == compared.report.read_bytes()
    assert not (folder / "data").exists()  # nothing had to run
    path = next((folder / "runs").glob("head-*-seed1")) / "manifest.json"
    tree = json.loads(path.read_text())
    scores = tree["metrics"]
    del tree["config"]["save_minutes"]  # as a version without that option would have left it
    path.write_text(json.dumps(tree | {"status": "running"}))
    run_compare(folder, {}, {}, jobs=1)
    after = stamps(folder)
    assert {name for name in after if after[name] != before[name]} == {
        str(path.relative_to(folder))
    }
    assert json.loads(path.read_text())["metrics"] == pytest.approx(scores)


def test_what_cannot_be_compared_is_told_before_anything_runs(given, tmp_path):
    with pytest.raises(UserError) as caught:
        run_compare(
            tmp_path / "a", given(target_modules=["nothing_like_it"]), {"methods": "lora,head"}
        )
    assert "lora-r1, lora-r2, lora-r4, lora-r8, lora-r16, lora-r32: " in str(caught.value)
    assert "nothing_like_it" in str(caught.value)
    assert "head: " not in str(caught.value)
    with pytest.raises(UserError, match=r"--reference lora-r9 is none of .* Did you mean"):
        run_compare(tmp_path / "b", given(), {"methods": "lora", "reference": "lora-r9"})
    assert not (tmp_path / "a" / "runs").exists()
    assert not (tmp_path / "b" / "runs").exists()


def test_a_run_of_other_options_in_its_place_is_refused(compared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(compared.pinned.folder, folder)
    path = next((folder / "runs").iterdir()) / "manifest.json"
    tree = json.loads(path.read_text())
    tree["config"]["epochs"] = 7.0
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="with another epochs than the comparison asks for"):
        run_compare(folder, {}, {}, reporter=Silent())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_signal_stops_every_run_and_the_same_command_goes_on(given, tmp_path, witness):
    """Ctrl+C, then SIGTERM to what went on, and then the end."""
    fit = given(epochs=100, eval_every=10**9)
    out, runs = tmp_path / "out", [f"lora-r{r}-lr0.001-seed0" for r in (1, 2)]
    folders = [out / "runs" / name for name in runs]
    pids: list[int] = []

    def when_both_train(number: int, before: list[int]) -> None:
        while not all(now > then for now, then in zip(logged(folders), before, strict=True)):
            time.sleep(0.02)
        pids.extend(int((folder / "run.lock").read_text()) for folder in folders)
        os.kill(os.getpid(), number)

    options = {"methods": "lora", "ranks": "1,2", "seeds": 1, "rates": 1}
    for number, given_options in ((signal.SIGINT, (fit, options)), (signal.SIGTERM, ({}, {}))):
        witness.notes.clear()
        told = (number, logged(folders))
        threading.Thread(target=when_both_train, args=told, daemon=True).start()
        with pytest.raises(Interrupted) as caught:
            run_compare(out, *given_options, jobs=2, reporter=witness)
        assert caught.value.number == number
        assert caught.value.resume == f"rankwise compare --out {out}"
        assert "Stopping after this step; again to stop at once." in witness.notes
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        states = {json.loads((f / "manifest.json").read_text())["status"] for f in folders}
        assert "interrupted" in states
    assert len(pids) == 4
    found = run_compare(out, {}, {}, jobs=2)
    assert {run.folder.name for run in found.runs} == {*runs}
    assert {run.training[-1].step for run in found.runs} == {100 * 6}
    assert any("Going on from step" in log.read_text() for log in (out / "logs").iterdir())


def logged(folders: list[Path]) -> list[int]:
    """How long the logs of these runs are."""
    logs = [folder / "metrics.jsonl" for folder in folders]
    return [log.stat().st_size if log.exists() else 0 for log in logs]
