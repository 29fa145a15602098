"""What each figure shows, read back from its numbers and from its SVG."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from rankwise.lab import figures
from rankwise.lab.comparing import comparisons
from rankwise.lab.costs import peak_memory, wall_time
from rankwise.lab.curves import evaluation_curves, training_curves
from rankwise.lab.settings import group_runs


def beside_reference(settings):
    return figures.beside_reference(settings, comparisons(settings))


ALL = (
    training_curves,
    evaluation_curves,
    figures.quality_by_rank,
    figures.quality_by_size,
    beside_reference,
    wall_time,
    peak_memory,
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
    some = figure.name in ("quality-by-rank", "beside-reference")
    assert some or all(setting.label in figure.alt for setting in settings)
    assert {len(row) for row in figure.rows} == {len(figure.columns)}
    missing = {"full fine-tuning"} if figure.name == "beside-reference" else set()
    assert {row[0] for row in figure.rows} == {setting.label for setting in settings} - missing
    assert "One seed." in figure.caption


@pytest.mark.parametrize("draw", ALL)
def test_axes_are_named_with_their_units(sweep, draw):
    wanted = {
        "training-loss": ("epoch", "training loss"),
        "evaluation": ("epoch", "accuracy (%)"),
        "quality-by-rank": ("rank r of LoRA (logarithmic)", "accuracy (%)"),
        "quality-by-size": ("trained parameters (logarithmic)", "accuracy (%)"),
        "beside-reference": ("accuracy less that of the reference (points)",),
        "wall-time": ("wall time of training (seconds)",),
        "peak-memory": ("peak memory (MB)",),
    }
    figure = draw(group_runs(sweep))
    assert set(wanted[figure.name]) <= set(texts(figure))


def test_to_the_right_is_better_where_less_is_better_too(record, lora):
    def by_loss(tree):
        tree.update(metric="loss")

    runs = [
        record("full", {"method": "full"}, 0.7, edit=by_loss),
        record("LoRA r=2", lora(2), 0.8, edit=by_loss),
    ]
    figure = beside_reference(group_runs(runs))
    assert figure.rows[0][:2] == ("LoRA r=2", pytest.approx(0.1))
    assert figure.columns[1] == "better by"
    assert "loss of the reference less that of the method" in texts(figure)


def test_ranks_stand_at_their_places_and_references_lie_level(sweep):
    figure = figures.quality_by_rank(group_runs(sweep))
    assert {"1", "2", "4", "8", "16", "32"} <= set(texts(figure))
    assert [key.label for key in figure.key] == [
        "LoRA over its ranks",
        "head only",
        "full fine-tuning",
    ]
    by_label = {row[0]: row for row in figure.rows}
    assert by_label["LoRA r=8"][1:4] == (8, 16.0, 0.771)
    assert by_label["head only"][1:4] == (None, None, 0.603)
    assert by_label["head only"][4] == pytest.approx(math.sqrt(0.603 * 0.397 / 872), rel=1e-3)


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


def test_both_rules_for_alpha_have_a_line_and_share_a_mark(record, lora):
    runs = [record(f"LoRA r={r}", lora(r), 0.7 + r / 100) for r in (2, 4, 8)]
    runs += [record(f"LoRA r={r}, fixed", lora(r, alpha=16.0), 0.7) for r in (2, 4)]
    figure = figures.quality_by_rank(group_runs(runs))
    assert [key.label for key in figure.key] == ["LoRA, α = 2·r", "LoRA, α = 16"]
    marks = [e for e in ET.fromstring(figure.svg).iter("use") if "var(--" in e.get("style", "")]
    lines = {m[1] for m in (re.search(r"fill: (var\(--\w+\))", e.get("style")) for e in marks) if m}
    assert {"var(--ink)", "var(--muted)"} <= lines
    assert len(figure.rows) == 5


def test_many_level_lines_have_no_bands(record, lora):
    others = [record(kind, {"method": kind}, 0.7) for kind in ("head", "full", "bitfit")]
    one = record("LoRA r=2", lora(2))
    few = figures.quality_by_rank(group_runs([one, *others[:2]]))
    many = figures.quality_by_rank(group_runs([one, *others]))
    assert few.caption.startswith("Bars and bands reach")
    assert many.caption.startswith("Bars reach")
    assert (few.svg.count("opacity: 0.12"), many.svg.count("opacity: 0.12")) == (2, 0)


def test_differences_from_the_reference_are_those_that_were_tested(sweep):
    settings = group_runs(sweep)
    made = comparisons(settings)
    figure = beside_reference(settings)
    for row, found in zip(figure.rows, made, strict=True):
        half = found.noise.half_width()
        assert row[:4] == (
            found.setting.label,
            found.difference,
            found.difference - half,
            found.difference + half,
        )
        assert row[-3:] == (found.p, found.corrected, found.verdict)
    assert "Worse than it: head only, LoRA r=1 and LoRA r=2." in figure.alt
    hollow = figure.svg.count("fill: none")
    assert hollow >= 4  # the four that are not told apart


def test_there_are_no_differences_without_answers(record):
    runs = [record(kind, {"method": kind}, answered=False) for kind in ("head", "full")]
    assert beside_reference(group_runs(runs)) is None


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
        record("head", {"method": "head"}, 0.6, edit=by_loss, answered=False),
        record("LoRA r=2", lora(2), 0.5, edit=by_loss, answered=False),
        record("LoRA r=4", lora(4), 0.7, edit=by_loss, answered=False),
    ]
    figure = figures.quality_by_size(group_runs(runs))
    assert [row[4] for row in figure.rows] == ["yes", "no", "yes"]
    assert "(lower is better)" in figure.caption
    assert "No standard error" in figure.caption
    assert "loss" in texts(figure)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "$x_{$", "a\nb\x00c", "漢字 ü", "_hidden", "]]>", ""]
)
def test_hostile_names_are_drawn_as_text(record, lora, name):
    settings = group_runs([record(name, lora(8)), record("head", {"method": "head"})])
    for draw in ALL:
        figure = draw(settings)
        assert "<script" not in figure.svg
        ET.fromstring(figure.svg)


def test_seeds_are_told(record, lora):
    runs = [record("head", {"method": "head"}, seed=s) for s in range(3)]
    runs.append(record("LoRA", lora(8)))
    for draw in ALL:
        assert "Seeds per method: 1 to 3." in draw(group_runs(runs)).caption
