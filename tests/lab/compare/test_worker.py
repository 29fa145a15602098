"""What a run leaves of its log: few entries that still tell every loss."""

import json

import pytest

from rankwise.lab.compare.worker import thin_log
from rankwise.lab.run_files import read_events


def write(path, losses, evaluated):
    lines = []
    for step, loss in enumerate(losses, start=1):
        lines.append({"event": "train", "step": step, "epoch": step / 10, "loss": loss})
        if step in evaluated:
            lines.append({"event": "eval", "step": step, "epoch": step / 10, "accuracy": 0.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path.read_bytes()


def test_each_entry_that_stays_is_the_mean_of_those_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [float(i) for i in range(10)], {5, 10})
    thin_log(path, most=4)
    training, evaluations = read_events(path)
    assert [(event.step, event.loss) for event in training] == [(3, 1), (6, 4), (9, 7), (10, 9)]
    assert [event.step for event in evaluations] == [5, 10]


def test_a_short_log_stays_as_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = write(path, [0.5, None, 0.25], {3})
    thin_log(path)
    assert path.read_bytes() == before


def test_a_loss_that_was_no_number_is_not_hidden(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1.0, None, 3.0, 5.0], {4})
    thin_log(path, most=2)
    training, _ = read_events(path)
    assert training[0].loss != training[0].loss
    assert training[1].loss == pytest.approx(4)
