"""Run folders read back, and what is refused."""

import json
import math

import pytest

from rankwise.errors import ArtifactError, UserError
from rankwise.lab.records import EvalEvent, in_order, printable, read_run, read_runs


def rewrite(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


# --- what is read --------------------------------------------------------------------------------


def test_a_run_is_read_back_as_it_was_written(make_run, lora):
    folder = make_run("LoRA r=8", lora(8), 0.74, seed=3)
    run = read_run(folder)
    written = json.loads((folder / "manifest.json").read_text("utf-8"))
    for name in ("name", "method", "config", "seed", "task", "metric", "metrics", "seconds"):
        assert getattr(run, name) == written[name]
    for name in ("artifact_bytes", "status", "data", "base", "code", "versions", "hardware"):
        assert getattr(run, name) == written[name]
    assert vars(run.counts) == written["counts"]
    assert (run.kind, run.rank, run.alpha, run.score) == ("lora", 8, 16.0, 0.74)
    assert run.evaluation_rows == 872
    assert run.usable
    assert len(run.training) == 120
    assert run.evaluations[-1] == EvalEvent(
        120, 4.0, {"loss": 2 - 0.74, "accuracy": 0.74, "f1": 0.74 - 0.03}
    )


def test_the_share_is_of_the_base(record, lora):
    counts = record("LoRA r=8", lora(8)).counts
    assert counts.adapter == 8 * 12 * 768
    assert counts.share == (8 * 12 * 768 + 3080) / 22_713_216


def test_other_methods_have_no_rank(record):
    run = record("head only", {"method": "head"})
    assert (run.rank, run.alpha) == (None, None)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_no_score(record, value):
    run = record("head", {"method": "head"}, edit=lambda m: m["metrics"].update(accuracy=value))
    assert math.isnan(run.score)
    assert not run.usable


def test_a_run_that_was_never_evaluated_has_no_score(record):
    def begun(tree):
        tree.update(status="running", metrics={})

    run = record("head", {"method": "head"}, edit=begun, log=[])
    assert math.isnan(run.score)
    assert (run.training, run.evaluations) == ((), ())


def test_the_evaluation_data_may_be_missing(record):
    run = record("head", {"method": "head"}, edit=lambda m: m["data"].update(eval=None))
    assert run.evaluation_rows is None


def test_where_a_record_lies_does_not_matter(make_run):
    one = read_run(make_run("head", {"method": "head"}))
    two = read_run(make_run("head", {"method": "head"}))
    assert one == two
    assert one.folder != two.folder


# --- answers, memory and what older runs lack ----------------------------------------------------


def test_the_answers_are_read_with_the_run(record):
    run = record("head", {"method": "head"}, 0.75, rows=200)
    assert run.contributions.mean() == 0.75
    assert (run.peak_of, run.peak_bytes) == ("process", 500_000_000 + 16 * 3080)
    assert not run.diverged
    assert not run.kept_last
    last = record("head", {"method": "head"}, edit=lambda m: m["config"].update(select="last"))
    assert last.kept_last


def test_a_run_may_have_left_no_answers(record):
    run = record("head", {"method": "head"}, answered=False)
    assert run.answers is None
    assert run.contributions is None


def test_answers_of_another_run_are_refused(make_run):
    folder = make_run("head", {"method": "head"})
    data = json.loads((folder / "manifest.json").read_text("utf-8"))["data"]
    data["eval"]["fingerprint"] = "another"
    rewrite(folder, data=data)
    with pytest.raises(ArtifactError, match="other evaluation data"):
        read_run(folder)


def test_the_first_runs_did_not_record_memory_and_divergence(make_run):
    folder = make_run("head", {"method": "head"})
    path = folder / "manifest.json"
    tree = json.loads(path.read_text("utf-8"))
    del tree["memory"], tree["diverged"]
    path.write_text(json.dumps(tree), "utf-8")
    run = read_run(folder)
    assert (run.peak_of, run.peak_bytes, run.diverged) == (None, None, False)


def test_memory_is_checked(make_run):
    folder = make_run("head", {"method": "head"}, edit=lambda m: m.update(memory={"of": "disk"}))
    with pytest.raises(ArtifactError, match=r"'memory.of' must be one of process, device"):
        read_run(folder)


# --- folders of runs -----------------------------------------------------------------------------


def test_runs_come_from_the_fewest_trained_parameters_up(make_run, lora, tmp_path):
    make_run("full", {"method": "full"})
    make_run("LoRA r=16", lora(16))
    make_run("LoRA r=2", lora(2), seed=1)
    make_run("LoRA r=2", lora(2), seed=0)
    make_run("head", {"method": "head"})
    (tmp_path / "runs" / "adapter").mkdir()
    (tmp_path / "runs" / "note.txt").write_text("no run", "utf-8")
    runs = read_runs(tmp_path / "runs")
    named = [(run.name, run.seed) for run in runs]
    assert named[1:3] == [("LoRA r=2", 0), ("LoRA r=2", 1)]
    assert [name for name, _ in named] == ["head", *["LoRA r=2"] * 2, "LoRA r=16", "full"]
    assert in_order(reversed(runs)) == runs


def test_a_run_folder_is_a_folder_of_one_run(make_run):
    folder = make_run("head", {"method": "head"})
    assert read_runs(folder) == [read_run(folder)]


def test_every_damaged_run_is_named(make_run, tmp_path):
    folders = [make_run("head", {"method": "head"}) for _ in range(3)]
    (folders[0] / "manifest.json").write_text("{", "utf-8")
    (folders[2] / "manifest.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        read_runs(tmp_path / "runs")
    assert str(folders[0]) in str(caught.value)
    assert str(folders[1]) not in str(caught.value)
    assert str(folders[2]) in str(caught.value)


@pytest.mark.parametrize("read", [read_run, read_runs])
def test_a_folder_without_runs_is_the_users_mistake(tmp_path, read):
    with pytest.raises(UserError, match="holds no"):
        read(tmp_path)
    with pytest.raises(UserError, match="There is no"):
        read(tmp_path / "nowhere")


def test_what_cannot_be_shown_is_replaced():
    assert printable("r=8 \x1b[31mα\n\ud800") == "r=8 \ufffd[31mα\ufffd\ufffd"
