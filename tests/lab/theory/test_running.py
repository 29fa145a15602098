"""run_theory: what it writes, what it leaves alone, and how it goes on after a stop."""

import json
import os
import signal
from dataclasses import replace

import pytest

from rankwise.errors import ArtifactError, UserError
from rankwise.lab.theory import Theory, run_theory
from rankwise.lab.theory.records import read_record, write_record
from rankwise.train.reporter import Silent
from rankwise.train.signals import Interrupted

TINY = Theory(outputs=4, inputs=4, steps=30, rows=(8,), draws=2, width=2, scaling_steps=5)


class Watcher(Silent):
    """Keeps what is said, and may stop the work after some pieces."""

    def __init__(self, stop_after=None):
        self.notes, self.progress, self.ended = [], [], False
        self.stop_after = stop_after

    def note(self, text):
        self.notes.append(text)

    def start(self, what, total, done=0):
        self.total = total

    def advance(self, done, values):
        self.progress.append(done)
        if len(self.progress) == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    def finish(self):
        self.ended = True


def measured(record):
    """The rows of a record, which depend on its options alone."""
    return record.bounds, record.inputs, record.samples, record.scaling


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = run_theory(theory=TINY)
    assert len(record.bounds) == 4 * 4
    assert record.versions["torch"]
    assert record.hardware["dtype"] == "float64"
    assert record.seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_records_page_and_numbers(folder, measured_record):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["numbers", "records.json", "report.html"]
    assert len(list((folder / "numbers").glob("*.csv"))) == 11
    text = (folder / "numbers" / "error-by-rank.csv").read_text("utf-8")
    assert text.count("\n") == 1 + len(measured_record.bounds)


def test_progress_ends_where_it_was_said_to(tmp_path):
    watcher = Watcher()
    run_theory(tmp_path / "t", TINY, watcher)
    assert watcher.progress == sorted(watcher.progress)
    assert watcher.progress[-1] == watcher.total
    assert watcher.ended


def test_what_is_finished_is_not_computed_again_and_other_files_stay(tmp_path):
    out = tmp_path / "t"
    first = run_theory(out, TINY)
    (out / "mine.txt").write_text("mine")
    (out / "report.html").unlink()
    (out / "numbers" / "mine.csv").write_text("mine")
    before = (out / "records.json").stat().st_mtime_ns
    watcher = Watcher()
    assert run_theory(out, TINY, watcher) == first
    assert (out / "records.json").stat().st_mtime_ns == before
    assert watcher.progress == []
    assert "finished before" in watcher.notes[0]
    assert (out / "report.html").exists()
    assert (out / "mine.txt").read_text() == (out / "numbers" / "mine.csv").read_text() == "mine"


def test_a_stop_keeps_what_is_done_and_the_next_call_goes_on(tmp_path):
    out = tmp_path / "t"
    watcher = Watcher(stop_after=3)
    with pytest.raises(Interrupted) as caught:
        run_theory(out, TINY, watcher)
    assert caught.value.number == signal.SIGINT
    assert str(caught.value).endswith(f"Go on with: {TINY.call(str(out))}")
    assert "Stopping after this step" in watcher.notes[0]
    assert "3 of 4 ranks against their bounds, and 0 rows" in watcher.notes[1]
    assert watcher.ended
    assert not (out / "report.html").exists()
    kept = read_record(out / "records.json")
    assert {row.r for row in kept.bounds} == {1, 2, 3}
    rest = Watcher()
    assert measured(run_theory(out, TINY, rest)) == measured(run_theory(theory=TINY))
    assert len(rest.progress) == 1 + 2 * 3 * 2


def test_the_command_that_goes_on_names_the_flags_that_were_given(tmp_path):
    with pytest.raises(Interrupted, match=r"rankwise theory --out .*/t --steps 1 --seed 3$"):
        run_theory(tmp_path / "t", Theory(steps=1, seed=3), Watcher(stop_after=1))


def test_what_another_version_kept_is_computed_anew(tmp_path):
    out = tmp_path / "t"
    with pytest.raises(Interrupted):
        run_theory(out, TINY, Watcher(stop_after=2))
    kept = read_record(out / "records.json")
    spoiled = replace(kept.bounds[0], error=123.0)
    other = replace(kept, versions={"torch": "1.0"}, bounds=(spoiled, *kept.bounds[1:]))
    write_record(out / "records.json", other)
    watcher = Watcher()
    record = run_theory(out, TINY, watcher)
    assert "computed anew" in watcher.notes[0]
    assert max(row.error for row in record.bounds) < 2


def test_options_that_differ_are_refused_and_named(tmp_path):
    out = tmp_path / "t"
    run_theory(out, TINY)
    before = (out / "records.json").read_bytes()
    with pytest.raises(UserError, match=r"other options \(steps 30 and not 31, seed 0 and not 1\)"):
        run_theory(out, replace(TINY, steps=31, seed=1))
    assert (out / "records.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "report.html").write_text("another page")
    with pytest.raises(UserError, match="is not empty, and holds no theory"):
        run_theory(tmp_path, TINY)
    assert (tmp_path / "report.html").read_text() == "another page"
    with pytest.raises(UserError, match="is a file; name a folder"):
        run_theory(tmp_path / "report.html", TINY)


def test_damaged_records_are_told_and_kept(tmp_path):
    (tmp_path / "records.json").write_text(json.dumps({"kind": "rankwise theory", "format": 1}))
    with pytest.raises(ArtifactError, match="is damaged"):
        run_theory(tmp_path, TINY)
    assert json.loads((tmp_path / "records.json").read_text())["format"] == 1


def test_the_threads_of_the_caller_are_given_back(tmp_path):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_theory(theory=TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
