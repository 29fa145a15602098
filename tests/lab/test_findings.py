"""Sentences say what the records hold, and claim nothing that is within the noise."""

import math

import numpy as np
import pytest

from rankwise.errors import UserError
from rankwise.lab.findings import findings, gap_closed, smallest_not_told_apart
from rankwise.lab.settings import compare, group_runs


def told(runs, spectra=None):
    return "\n".join(findings(runs, spectra))


def test_a_sweep_is_told(sweep):
    said = findings(sweep)
    assert said[0].startswith(
        "Best score: full fine-tuning, accuracy 78.9 % on 872 evaluation rows "
        "(standard error 1.4 points). It is not told apart from LoRA r=4, LoRA r=8, LoRA r=16 and "
        "LoRA r=32:"
    )
    assert said[1] == (
        "Full fine-tuning is 18.6 points better than head-only training. LoRA r=16 covers 93 % of "
        "that gap (standard error 10 points), training 150,536 parameters: 0.663 % of the "
        "22,713,216 in the base."
    )
    assert said[2].startswith(
        "The smallest rank tried that is not told apart from the best LoRA run (LoRA r=16) is that "
        "of LoRA r=2, with 21,512 trained parameters instead of 150,536."
    )
    assert "would not be seen here" in said[2]
    assert "Every result comes from one seed" in told(sweep)
    assert "a little optimistic" in told(sweep)
    assert "exactly those the formula gives" in told(sweep)


def test_who_is_not_told_apart_is_who_the_error_says(sweep):
    rows = 872
    accuracy = {run.name: run.score for run in sweep}
    best = max(accuracy.values())
    close = [
        name
        for name, p in accuracy.items()
        if p != best and best - p < 2 * math.sqrt(p * (1 - p) / rows + best * (1 - best) / rows)
    ]
    assert close == ["LoRA r=4", "LoRA r=8", "LoRA r=16", "LoRA r=32"]


def test_with_many_rows_the_best_stands_out(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.6, rows=100_000),
        record("LoRA r=1", lora(1), 0.7, rows=100_000),
        record("LoRA r=2", lora(2), 0.8, rows=100_000),
        record("full", {"method": "full"}, 0.9, rows=100_000),
    ]
    said = told(runs)
    assert "ahead of every other method by at least twice the standard error" in said
    assert "No smaller rank tried comes within the noise of LoRA r=2." in said
    assert "Of 6 pairs of methods, 0 differ by less" in said


def test_the_best_may_be_the_smallest(record, lora):
    runs = [record("LoRA r=1", lora(1), 0.8), record("LoRA r=2", lora(2), 0.79)]
    assert "The best of the LoRA runs, LoRA r=1, has the smallest rank tried." in told(runs)


def test_the_gap_is_shared_out(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.6, rows=10_000),
        record("LoRA r=1", lora(1), 0.6, rows=10_000),
        record("LoRA r=2", lora(2), 0.75, rows=10_000),
        record("LoRA r=4", lora(4), 0.84, rows=10_000),
        record("full", {"method": "full"}, 0.8, rows=10_000),
    ]
    gaps = gap_closed(group_runs(runs))
    assert [gap.setting.label for gap in gaps] == ["LoRA r=1", "LoRA r=2", "LoRA r=4"]
    assert [gap.share for gap in gaps] == pytest.approx([0.0, 0.75, 1.2])


def test_the_error_of_the_share_is_that_of_simulation(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.6, rows=5000),
        record("LoRA r=2", lora(2), 0.75, rows=5000),
        record("full", {"method": "full"}, 0.8, rows=5000),
    ]
    (gap,) = gap_closed(group_runs(runs))
    rng = np.random.default_rng(0)
    head, mid, full = (rng.binomial(5000, p, 200_000) / 5000 for p in (0.6, 0.75, 0.8))
    assert gap.standard_error == pytest.approx(np.std((mid - head) / (full - head)), rel=0.02)


def test_no_share_of_a_gap_that_is_not_established(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.70, rows=200),
        record("LoRA r=2", lora(2), 0.72, rows=200),
        record("full", {"method": "full"}, 0.73, rows=200),
    ]
    assert gap_closed(group_runs(runs)) == []
    said = told(runs)
    assert "differ by 3.0 points, which is not established (twice the standard error is 9.0" in said
    assert "covers" not in said


def test_no_gap_to_close_where_full_fine_tuning_is_worse(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.8),
        record("LoRA r=2", lora(2), 0.75),
        record("full", {"method": "full"}, 0.5),
    ]
    assert gap_closed(group_runs(runs)) == []
    assert "scored 30.0 points worse than head-only training" in told(runs)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (["head"], "There is no finished full fine-tuning run"),
        (["full"], "There is no finished head-only run"),
        ([], "no finished head-only and no finished full fine-tuning run"),
    ],
)
def test_what_is_missing_for_the_gap_is_said(record, lora, left, words):
    runs = [record("LoRA r=2", lora(2)), *(record(kind, {"method": kind}) for kind in left)]
    assert words in told(runs)


def test_without_lora_no_word_of_the_gap(record):
    runs = [record("head", {"method": "head"}), record("full", {"method": "full"}, 0.9)]
    said = told(runs)
    assert "LoRA" not in said
    assert "formula" not in said


def test_one_run_is_compared_with_nothing(record, lora):
    said = findings([record("LoRA r=8", lora(8))])
    assert said[0].startswith("LoRA r=8: accuracy 74.0 % on 872 evaluation rows")
    assert said[0].endswith("There is no other finished method to compare it with.")
    assert "pair" not in "\n".join(said)


def test_a_metric_without_an_error_claims_nothing(record, lora):
    def by_f1(tree):
        tree["metric"] = "f1"

    runs = [
        record("head", {"method": "head"}, 0.5, edit=by_f1),
        record("LoRA r=1", lora(1), 0.7, edit=by_f1),
        record("LoRA r=2", lora(2), 0.9, edit=by_f1),
        record("full", {"method": "full"}, 0.95, edit=by_f1),
    ]
    said = told(runs)
    assert "Best score: full, f1 0.92 on 872 evaluation rows." in said
    assert "whether it is truly ahead is not known" in said
    assert "(the records give no standard error)" in said
    assert "Of the LoRA runs, LoRA r=2 has the best score." in said
    assert "covers" not in said
    assert "pairs" not in said


def test_nothing_usable_is_said(record):
    runs = [record("head", {"method": "head"}, edit=lambda m: m["metrics"].update(accuracy=None))]
    said = told(runs)
    assert "nothing is compared" in said
    assert "Finished without a finite score, and not compared: head." in said


def test_unfinished_runs_do_not_count(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.6),
        record("LoRA r=2", lora(2), 0.9, edit=lambda m: m.update(status="interrupted")),
    ]
    said = told(runs)
    assert "head: accuracy 60.0 %" in said
    assert "Shown but not used in any comparison: LoRA r=2 (interrupted)." in said


def test_counts_that_break_the_formula_are_told(record, lora):
    runs = [
        record("LoRA r=1", lora(1)),
        record("LoRA r=2", lora(2), edit=lambda m: m["counts"].update(adapter=1)),
    ]
    assert "counted in LoRA r=2 are not those the formula gives" in told(runs)


def test_skipped_steps_are_told(record):
    log = [
        {"event": "train", "step": n, "epoch": n / 4, "loss": 1.0, "skipped": n // 2}
        for n in range(1, 5)
    ]
    said = told([record("head", {"method": "head"}, log=log)])
    assert "skipped because a gradient was not finite: 2 in head." in said


def test_several_seeds_are_told_as_such(record, lora):
    runs = [record("head", {"method": "head"}, 0.6, seed=s) for s in (0, 1)]
    assert "one seed" not in told(runs)
    assert "LoRA r=2 comes from one seed:" in told([*runs, record("LoRA r=2", lora(2), 0.9)])
    runs += [record("LoRA r=2", lora(2), 0.9), record("LoRA r=4", lora(4), 0.9)]
    assert "LoRA r=2 and LoRA r=4 come from one seed:" in told(runs)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m["base"].update(fingerprint="x"), "do not share their base models"),
        (lambda m: m["data"]["train"].update(fingerprint="x"), "do not share their training data"),
    ],
)
def test_runs_on_another_ground_are_told(record, lora, edit, words):
    runs = [record("head", {"method": "head"}), record("LoRA r=2", lora(2), edit=edit)]
    assert words in told(runs)


def test_the_energy_of_the_update_is_told(sweep, spectra):
    said = told(sweep, spectra)
    assert "90 % of the energy of the learned update lies in 2 to 4 of up to 8 directions" in said
    assert "(median over 12 layers: 2)" in said
    assert "energy" not in told(sweep, {"layer": [0.0, 0.0]})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.update(task="regression"), "their task: classification, regression"),
        (lambda m: m.update(metric="f1"), "their metric: accuracy, f1"),
        (
            lambda m: m["data"]["eval"].update(fingerprint="x"),
            "their evaluation data: e5f6a7b8, x",
        ),
        (lambda m: m["data"].update(eval=None), "their evaluation data: None, e5f6a7b8"),
    ],
)
def test_what_cannot_be_compared_is_refused(record, edit, words):
    runs = [record("head", {"method": "head"}), record("two", {"method": "head"}, edit=edit)]
    with pytest.raises(UserError, match=words) as caught:
        findings(runs)
    assert caught.value.exit_code == 2


def test_no_runs_are_refused():
    with pytest.raises(UserError, match="at least one run"):
        findings([])


def test_the_smallest_rank_is_the_first_that_the_best_does_not_clearly_beat(sweep):
    lora = [s for s in group_runs(sweep) if s.first.rank is not None]
    best = max(lora, key=lambda s: s.score)
    wanted = next(s for s in lora if not compare(best, s).clear)
    assert smallest_not_told_apart(lora) == wanted
    assert smallest_not_told_apart([]) is None
