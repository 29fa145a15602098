"""The files of a run folder: cut, damaged and incomplete ones."""

import json
import math

import pytest

from rankwise.errors import ArtifactError
from rankwise.lab.records import read_run


def rewrite(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def append(folder, data: bytes):
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(data)


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
