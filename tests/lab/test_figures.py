"""What each figure shows, read back from its numbers and from its SVG."""

import math
import re
import xml.etree.ElementTree as ET
from statistics import fmean

import pytest

from rankwise.lab import figures
from rankwise.lab.settings import group_runs

ALL = (
    figures.training_curves,
    figures.evaluation_curves,
    figures.quality_by_rank,
    figures.quality_by_size,
    figures.wall_time,
)


def texts(figure):
    return [e.text for e in ET.fromstring(figure.svg).iter("text")]


@pytest.mark.parametrize("draw", ALL)
def test_every_figure_can_be_read_without_being_seen(sweep, draw):
    settings = group_runs(sweep)
    figure = draw(settings)
    assert figure == draw(settings)
    assert figure.title
    assert figure.caption.endswith(".")
    assert all(setting.label in figure.alt for setting in settings if "rank" not in figure.name)
    assert {len(row) for row in figure.rows} == {len(figure.columns)}
    assert {row[0] for row in figure.rows} == {setting.label for setting in settings}
    assert "One seed." in figure.caption


@pytest.mark.parametrize("draw", ALL)
def test_axes_are_named_with_their_units(sweep, draw):
    wanted = {
        "training-loss": ("epoch", "training loss"),
        "evaluation": ("epoch", "accuracy (%)"),
        "quality-by-rank": ("rank r of LoRA (logarithmic)", "accuracy (%)"),
        "quality-by-size": ("trained parameters (logarithmic)", "accuracy (%)"),
        "wall-time": ("wall time of training (seconds)",),
    }
    figure = draw(group_runs(sweep))
    assert set(wanted[figure.name]) <= set(texts(figure))


def test_training_points_are_means_of_the_log(record, lora):
    run = record("LoRA r=8", lora(8))
    figure = figures.training_curves(group_runs([run]), points=7)
    assert [row[4] for row in figure.rows] == [18] * 6 + [12]
    assert figure.rows[0][2] == pytest.approx(fmean(e.epoch for e in run.training[:18]))
    assert figure.rows[0][3] == pytest.approx(fmean(e.loss for e in run.training[:18]))
    assert "Log entries behind each point: 12 to 18." in figure.caption


def test_a_loss_that_is_not_finite_is_left_out_and_counted(record):
    log = [
        {"event": "train", "step": n, "epoch": n / 10, "loss": math.nan if n % 2 else 1.0}
        for n in range(1, 11)
    ]
    figure = figures.training_curves(group_runs([record("head", {"method": "head"}, log=log)]))
    assert [row[3] for row in figure.rows] == [1.0] * 5
    assert "left out because their loss is not finite: 5." in figure.caption


def test_a_single_point_is_drawn_as_a_mark(record):
    log = [{"event": "train", "step": 1, "epoch": 0.1, "loss": 1.0}]
    figure = figures.training_curves(group_runs([record("head", {"method": "head"}, log=log)]))
    uses = [e.get("style", "") for e in ET.fromstring(figure.svg).iter("use")]
    assert any("var(--c6)" in style for style in uses)


def test_evaluations_are_those_of_the_log(record, lora):
    run = record("LoRA r=8", lora(8))
    figure = figures.evaluation_curves(group_runs([run]))
    assert figure.rows == tuple(
        ("LoRA r=8", 0, e.epoch, e.metrics["accuracy"]) for e in run.evaluations
    )


@pytest.mark.parametrize("draw", [figures.training_curves, figures.evaluation_curves])
def test_there_is_no_curve_without_a_log(record, draw):
    assert draw(group_runs([record("head", {"method": "head"}, log=[])])) is None


def test_ranks_stand_at_their_places_and_references_lie_level(sweep):
    figure = figures.quality_by_rank(group_runs(sweep))
    assert {"1", "2", "4", "8", "16", "32"} <= set(texts(figure))
    assert [key.label for key in figure.key] == [
        "LoRA over its ranks",
        "head only",
        "full fine-tuning",
    ]
    by_label = {row[0]: row for row in figure.rows}
    assert by_label["LoRA r=8"][1:3] == (8, 0.771)
    assert by_label["head only"][1:3] == (None, 0.603)
    assert by_label["head only"][3] == pytest.approx(math.sqrt(0.603 * 0.397 / 872))


def test_the_rank_axis_is_logarithmic(sweep):
    root = ET.fromstring(figures.quality_by_rank(group_runs(sweep)).svg)
    at = {e.text: float(e.get("x")) for e in root.iter("text") if e.get("x")}
    steps = [at[b] - at[a] for a, b in (("1", "2"), ("2", "4"), ("8", "16"), ("16", "32"))]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.05)
    assert steps[0] > 20


def test_lora_runs_of_another_kind_are_joined_apart(record, lora):
    runs = [record(f"LoRA r={r}", lora(r), 0.7 + r / 100) for r in (2, 4)]
    runs.append(record("LoRA r=4", lora(4, target_modules=["all-linear"]), 0.78))
    figure = figures.quality_by_rank(group_runs(runs))
    assert {key.label for key in figure.key} == {"LoRA, query, value", "LoRA, all-linear"}
    assert "side by side" in figure.caption


def test_there_is_no_figure_by_rank_without_a_scored_lora_run(record, lora):
    assert figures.quality_by_rank(group_runs([record("head", {"method": "head"})])) is None
    unscored = record("LoRA", lora(8), edit=lambda m: m["metrics"].update(accuracy=None))
    assert figures.quality_by_rank(group_runs([unscored])) is None
    assert figures.quality_by_size(group_runs([unscored])) is None


def test_one_rank_alone_is_drawn(record, lora):
    figure = figures.quality_by_rank(group_runs([record("LoRA", lora(8))]))
    assert "8" in texts(figure)
    assert "no other method" in figure.alt


def test_the_frontier_is_told(sweep):
    figure = figures.quality_by_size(group_runs(sweep))
    off = [row[0] for row in figure.rows if row[4] == "no"]
    assert off == ["LoRA r=32"]
    assert "LoRA r=16 and full fine-tuning." in figure.alt
    assert "(higher is better)" in figure.caption
    assert {"10 k", "100 k", "1 M", "10 M"} <= set(texts(figure))


def test_the_frontier_is_level_until_more_parameters_buy_more(sweep):
    root = ET.fromstring(figures.quality_by_size(group_runs(sweep)).svg)
    (path,) = [e.get("d") for e in root.iter("path") if "stroke-width: 1.1" in e.get("style", "")]
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    assert points[1][0] > points[0][0]
    assert points[1][1] == points[0][1]  # first along, at the score that is had already
    assert points[2][0] == points[1][0]
    assert points[2][1] < points[1][1]  # and only then up


def test_a_lower_loss_is_better(record, lora):
    def by_loss(tree):
        tree["metric"] = "loss"

    runs = [
        record("head", {"method": "head"}, 0.6, edit=by_loss),
        record("LoRA r=2", lora(2), 0.5, edit=by_loss),
        record("LoRA r=4", lora(4), 0.7, edit=by_loss),
    ]
    figure = figures.quality_by_size(group_runs(runs))
    assert [row[4] for row in figure.rows] == ["yes", "no", "yes"]
    assert "(lower is better)" in figure.caption
    assert "No standard error" in figure.caption
    assert "loss" in texts(figure)


def bar_lengths(figure):
    """Widths of the filled rectangles that are drawn in a colour of a series."""
    paths = [
        e.get("d")
        for e in ET.fromstring(figure.svg).iter("path")
        if re.search(r"fill: var\(--[cr]\d\)", e.get("style", ""))
    ]
    xs = [[float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", d)] for d in paths]
    return [max(x) - min(x) for x in xs]


def test_bars_are_as_long_as_the_times(sweep):
    settings = group_runs(sweep)
    lengths = bar_lengths(figures.wall_time(settings))
    times = [setting.seconds for setting in settings]
    assert len(lengths) == len(times)
    ratios = [length / time for length, time in zip(lengths, times, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)


def test_long_times_are_in_minutes(record):
    def slow(tree):
        tree["seconds"]["train"] = 900.0

    figure = figures.wall_time(group_runs([record("x" * 40, {"method": "head"}, edit=slow)]))
    assert "wall time of training (minutes)" in texts(figure)
    assert "15" in texts(figure)
    assert figure.rows == (("x" * 40, 900.0, 1),)
    assert "x" * 21 + "…" in texts(figure)


def test_there_are_no_bars_without_times(record):
    run = record("head", {"method": "head"}, edit=lambda m: m["seconds"].update(train=math.nan))
    assert figures.wall_time(group_runs([run])) is None


def test_seeds_are_told(record, lora):
    runs = [record("head", {"method": "head"}, seed=s) for s in range(3)]
    runs.append(record("LoRA", lora(8)))
    for draw in ALL:
        assert "Seeds per method: 1 to 3." in draw(group_runs(runs)).caption
    assert len(figures.evaluation_curves(group_runs(runs)).rows) == 16


def test_styles_are_the_same_in_every_figure_and_no_two_are_alike(sweep, record, lora):
    others = [record(f"other {n}", {"method": "bitfit", "n": n}) for n in range(5)]
    others.append(record("head again", {"method": "head", "deep": True}))
    settings = group_runs([*sweep, *others])
    styles = figures.styles_of(settings)
    assert len(set(styles)) == len(settings)
    by_label = {s.label: style for s, style in zip(settings, styles, strict=True)}
    ramp = [by_label[f"LoRA r={r}"].colour for r in (1, 2, 4, 8, 16, 32)]
    assert ramp == sorted(ramp)
    assert len(set(ramp)) == 6
    keys = {key.label: key.swatch for key in figures.training_curves(settings).key}
    assert keys["LoRA r=8"] == by_label["LoRA r=8"].swatch(marker=False)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "$x_{$", "a\nb\x00c", "漢字 ü", "_hidden", "]]>", ""]
)
def test_hostile_names_are_drawn_as_text(record, lora, name):
    settings = group_runs([record(name, lora(8)), record("head", {"method": "head"})])
    for draw in ALL:
        figure = draw(settings)
        assert "<script" not in figure.svg
        ET.fromstring(figure.svg)
