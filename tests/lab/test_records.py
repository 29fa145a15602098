"""Run folders read back, and what is refused."""

import json
import math

import pytest

from rankwise.errors import ArtifactError, UserError
from rankwise.lab.records import EvalEvent, in_order, printable, read_run, read_runs


def rewrite(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def append(folder, data: bytes):
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(data)


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


# --- the log -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail", [b'{"event": "train", "step": 121, "epo', b"{", b'{"event": "train", "x": "\xc3']
)
def test_a_cut_last_line_is_left_out(make_run, tail):
    folder = make_run("head", {"method": "head"})
    whole = read_run(folder)
    append(folder, tail)
    assert read_run(folder) == whole


def test_a_whole_last_line_counts_without_its_newline(make_run):
    folder = make_run("head", {"method": "head"})
    append(folder, b'{"event": "train", "step": 121, "epoch": 4.1, "loss": 0.5}')
    assert read_run(folder).training[-1].step == 121


@pytest.mark.parametrize("tail", [b'{"event": "tra\n', b'{"cut": \n{"event": "note"}'])
def test_a_cut_line_elsewhere_is_damage(make_run, tail):
    folder = make_run("head", {"method": "head"})
    append(folder, tail)
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl:125 is damaged") as caught:
        read_run(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[1]\n", "with an 'event'"),
        (b'{"step": 1}\n', "with an 'event'"),
        (b'{"event": "train", "step": 200, "epoch": 5.0}\n', "'loss' is missing"),
        (b'{"event": "train", "step": 200, "epoch": 5, "loss": "x"}\n', "'loss' must be"),
        (b'{"event": "eval", "step": 1.5, "epoch": 5.0}\n', "'step' must be a whole number"),
        (b'{"event": "eval", "step": 200, "epoch": NaN}\n', "'epoch' must be a finite number"),
    ],
)
def test_an_event_must_be_whole(make_run, line, words):
    folder = make_run("head", {"method": "head"})
    append(folder, line)
    with pytest.raises(ArtifactError, match=words) as caught:
        read_run(folder)
    assert "metrics.jsonl:125" in str(caught.value)


def test_what_a_resumed_run_logs_again_replaces_what_stood_there(record):
    def train(step, loss):
        return {"event": "train", "step": step, "epoch": step / 2, "loss": loss}

    def evaluation(step, accuracy):
        return {"event": "eval", "step": step, "epoch": step / 2, "accuracy": accuracy}

    log = [train(1, 9.0), train(2, 8.0), evaluation(2, 0.1), train(3, 7.0)]
    again = [train(2, 6.0), evaluation(2, 0.2), train(3, 5.0)]
    run = record("head", {"method": "head"}, log=[*log, {"event": "resume"}, *again])
    assert [(e.step, e.loss) for e in run.training] == [(1, 9.0), (2, 6.0), (3, 5.0)]
    assert [(e.step, e.metrics) for e in run.evaluations] == [(2, {"accuracy": 0.2})]


def test_a_loss_may_be_null_and_skipped_steps_are_counted(record):
    event = {"event": "train", "step": 1, "epoch": 1.0, "loss": None, "skipped": 2}
    (read,) = record("head", {"method": "head"}, log=[event]).training
    assert math.isnan(read.loss)
    assert read.skipped == 2


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_a_run_that_has_just_begun_has_no_log(make_run, status):
    folder = make_run("head", {"method": "head"})
    rewrite(folder, status=status)
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).training == ()


def test_a_finished_run_has_a_log(make_run):
    folder = make_run("head", {"method": "head"})
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl is missing"):
        read_run(folder)


# --- damaged manifests ---------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"{", b'{"format": 1, "name": "a', b"\xff\xfe\x00"])
def test_a_cut_manifest_is_damage(make_run, data):
    folder = make_run("head", {"method": "head"})
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged") as caught:
        read_run(folder)
    assert caught.value.exit_code == 3


def test_a_manifest_must_be_an_object(make_run):
    folder = make_run("head", {"method": "head"})
    (folder / "manifest.json").write_text("[]", "utf-8")
    with pytest.raises(ArtifactError, match="must hold a JSON object, got list"):
        read_run(folder)


def test_a_missing_manifest_is_damage_where_a_log_is_there(make_run):
    folder = make_run("head", {"method": "head"})
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        read_run(folder)


@pytest.mark.parametrize("number", [2, None, "1"])
def test_another_format_is_refused(make_run, number):
    folder = make_run("head", {"method": "head"})
    rewrite(folder, format=number)
    with pytest.raises(ArtifactError, match="reads format 1"):
        read_run(folder)


def test_all_that_is_wrong_is_said_at_once(make_run):
    def spoil(tree):
        del tree["seed"], tree["counts"]["base"]
        tree.update(status="done", notes="none", artifact_bytes=-1)
        tree["counts"]["head"] = True
        tree["data"]["train"] = None

    folder = make_run("head", {"method": "head"}, edit=spoil)
    with pytest.raises(ArtifactError) as caught:
        read_run(folder)
    message = str(caught.value)
    assert "not a complete record of a run" in message
    for line in (
        "'seed' is missing; it must be a whole number.",
        "'counts.base' is missing; it must be a whole number of 1 or more.",
        "'counts.head' must be a whole number of 0 or more, got True.",
        "'status' must be one of finished, interrupted, failed, running, got 'done'.",
        "'notes' must be a list of texts, got 'none'.",
        "'artifact_bytes' must be a whole number of bytes, or null, got -1.",
        "'data.train' must be an object, got None.",
    ):
        assert line in message
    assert message.count("\n  - ") == 7


@pytest.mark.parametrize("key", ["r", "alpha"])
def test_a_lora_run_needs_its_rank_and_alpha(make_run, lora, key):
    folder = make_run("LoRA", lora(8), edit=lambda m: m["method"].pop(key))
    with pytest.raises(ArtifactError, match=f"'method.{key}' is missing"):
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
