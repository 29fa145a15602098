"""Curves: means of the log, and parts that can be read."""

import math
import xml.etree.ElementTree as ET
from statistics import fmean

import pytest

from rankwise.lab.curves import evaluation_curves, parts_of, training_curves
from rankwise.lab.settings import group_runs


def test_training_points_are_means_of_the_log(record, lora):
    run = record("LoRA r=8", lora(8))
    figure = training_curves(group_runs([run]), points=7)
    assert [row[3] for row in figure.rows] == [18] * 6 + [12]
    assert figure.rows[0][1] == pytest.approx(fmean(e.epoch for e in run.training[:18]))
    assert figure.rows[0][2] == pytest.approx(fmean(e.loss for e in run.training[:18]))
    assert "Log entries behind each point: 12 to 18." in figure.caption


def test_a_loss_that_is_not_finite_is_left_out_and_counted(record):
    log = [
        {"event": "train", "step": n, "epoch": n / 10, "loss": math.nan if n % 2 else 1.0}
        for n in range(1, 11)
    ]
    figure = training_curves(group_runs([record("head", {"method": "head"}, log=log)]))
    assert [row[2] for row in figure.rows] == [1.0] * 5
    assert "left out because their loss is not finite: 5." in figure.caption


def test_a_single_point_is_drawn_as_a_mark(record):
    log = [{"event": "train", "step": 1, "epoch": 0.1, "loss": 1.0}]
    figure = training_curves(group_runs([record("head", {"method": "head"}, log=log)]))
    uses = [e.get("style", "") for e in ET.fromstring(figure.svg).iter("use")]
    assert any("var(--c6)" in style for style in uses)


def test_evaluations_are_those_of_the_log(record, lora):
    run = record("LoRA r=8", lora(8))
    figure = evaluation_curves(group_runs([run]))
    assert figure.rows == tuple(
        ("LoRA r=8", e.epoch, e.metrics["accuracy"], 1) for e in run.evaluations
    )


@pytest.mark.parametrize("draw", [training_curves, evaluation_curves])
def test_there_is_no_curve_without_a_log(record, draw):
    assert draw(group_runs([record("head", {"method": "head"}, log=[])])) is None


def test_several_seeds_are_one_line_of_means(record):
    runs = [record("head", {"method": "head"}, p, seed=s) for s, p in enumerate((0.6, 0.7, 0.8))]
    figure = evaluation_curves(group_runs(runs))
    assert len(figure.rows) == 4
    for row, events in zip(
        figure.rows, zip(*(r.evaluations for r in runs), strict=True), strict=True
    ):
        assert row[2] == pytest.approx(fmean(e.metrics["accuracy"] for e in events))
        assert row[3] == 3
    assert "mean over the seeds" in figure.caption
    losses = training_curves(group_runs(runs), points=120)
    assert losses.rows[7][2] == pytest.approx(fmean(r.training[7].loss for r in runs))
    assert losses.rows[7][3] == 3


def test_few_settings_share_a_figure(sweep):
    settings = group_runs(sweep)
    (part,) = parts_of(settings)
    assert (part.name, part.settings) == ("", tuple(settings))


def test_many_settings_are_shown_in_parts(sweep, record, lora):
    runs = [*sweep, record("bitfit", {"method": "bitfit"})]
    runs += [record(f"fixed r={r}", lora(r, alpha=16.0), 0.5) for r in (1, 2, 4)]
    settings = group_runs(runs)
    parts = {part.name: [s.label for s in part.settings] for part in parts_of(settings)}
    assert sorted(parts["-methods"]) == ["LoRA r=4", "bitfit", "full fine-tuning", "head only"]
    assert parts["-ranks-1"] == [f"LoRA r={r}" for r in (1, 2, 4, 8, 16, 32)]
    assert parts["-ranks-2"] == ["fixed r=1", "fixed r=2", "fixed r=4", "LoRA r=8"]
    drawn = [training_curves(settings, part) for part in parts_of(settings)]
    assert [f.name for f in drawn] == [f"training-loss{name}" for name in parts]
    assert drawn[2].title == "Training loss, LoRA, α = 16"
    shared = [{k.label: k.swatch for k in f.key}["LoRA r=8"] for f in drawn[1:]]
    assert shared[0] == shared[1]
