"""Sentences say what the records hold, and claim nothing that is within the noise."""

import math

import pytest
from scipy import stats

from rankwise.errors import UserError
from rankwise.lab.findings import findings


def told(runs, spectra=None):
    return "\n".join(findings(runs, spectra))


def test_a_sweep_is_told(sweep):
    said = findings(sweep)
    assert said[0] == (
        "Best score: full fine-tuning, accuracy 78.9 % on 872 evaluation rows (standard error 1.4 "
        "points). It is what the others are compared with."
    )
    assert said[1] == (
        "Beside full fine-tuning (Holm's correction over 7 comparisons): worse by more than the "
        "noise: head only (18.6 points), LoRA r=1 (10.7 points) and LoRA r=2 (4.8 points); not "
        "told apart: LoRA r=4, LoRA r=8, LoRA r=16 and LoRA r=32."
    )
    assert said[2].startswith(
        "Full fine-tuning is 18.6 points better than head-only training. LoRA r=16 covers 93 % of "
        "that gap (± "
    )
    assert said[2].endswith("training 150,536 parameters: 0.663 % of the 22,713,216 in the base.")
    assert said[3].startswith(
        "The smallest LoRA update that the best one (LoRA r=16) does not beat by more than the "
        "noise is LoRA r=4, with 39,944 trained parameters instead of 150,536."
    )
    assert "would not be seen here" in said[3]
    assert "Every result comes from one seed" in told(sweep)
    assert "a little optimistic" in told(sweep)
    assert "exactly those the formula gives" in told(sweep)


def test_who_is_told_apart_is_who_the_paired_tests_say(sweep):
    """Holm's steps on SciPy's p of every pair with full fine-tuning."""
    right = {run.name: run.answers.labels == run.answers.predictions for run in sweep}
    full = right.pop("full fine-tuning").astype(float)
    p = {name: stats.ttest_rel(full, own.astype(float)).pvalue for name, own in right.items()}
    worse: list[str] = []
    for k, name in enumerate(sorted(p, key=p.__getitem__)):
        if p[name] > 0.05 / (len(p) - k):
            break
        worse.append(name)
    assert sorted(worse) == ["LoRA r=1", "LoRA r=2", "head only"]
    sentence = findings(sweep)[1].partition("; not told apart: ")[0]
    assert all(name in sentence for name in worse)


def test_another_reference_may_be_named(sweep):
    said = findings(sweep, reference="head")
    assert "It is 18.6 points better than head only, which is more than the noise." in said[0]
    assert "Beside head only (Holm's correction over 7 comparisons): better by more" in said[1]
    assert findings(sweep, reference="LoRA r=8")[1].startswith("Beside LoRA r=8 (Holm")
    with pytest.raises(UserError, match=r"No finished run is the reference 'ful'\. Did you mean"):
        findings(sweep, reference="ful")


def test_with_many_rows_every_step_stands_out(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.6, rows=20_000),
        record("LoRA r=1", lora(1), 0.7, rows=20_000),
        record("LoRA r=2", lora(2), 0.8, rows=20_000),
        record("full", {"method": "full"}, 0.9, rows=20_000),
    ]
    said = told(runs)
    assert "worse by more than the noise: head (30.0 points), LoRA r=1 (20.0 points)" in said
    assert "not told apart" not in said
    assert "LoRA r=2 is better than every smaller LoRA update by more than the noise." in said


def test_the_best_may_be_the_smallest(record, lora):
    runs = [record("LoRA r=1", lora(1), 0.8), record("LoRA r=2", lora(2), 0.79)]
    assert "The best of the LoRA runs, LoRA r=1, has the smallest update tried." in told(runs)


def test_no_share_of_a_gap_that_is_not_established(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.70, rows=200),
        record("LoRA r=2", lora(2), 0.72, rows=200),
        record("full", {"method": "full"}, 0.73, rows=200),
    ]
    said = told(runs)
    assert "differ by 3.0 points, which is within the noise, so no share" in said
    assert "covers" not in said


def test_no_gap_to_close_where_full_fine_tuning_is_worse(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.8),
        record("LoRA r=2", lora(2), 0.75),
        record("full", {"method": "full"}, 0.5),
    ]
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


def test_without_answers_nothing_is_claimed(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.5, answered=False),
        record("LoRA r=1", lora(1), 0.7, answered=False),
        record("LoRA r=2", lora(2), 0.9, answered=False),
        record("full", {"method": "full"}, 0.95, answered=False),
    ]
    said = told(runs)
    assert "Best score: full, accuracy 95.0 % on 872 evaluation rows" in said
    assert "Some runs left no answers to the single evaluation rows" in said
    assert "differ by 45.0 points, and the noise is not known" in said
    assert "Of the LoRA runs, LoRA r=2 has the best score." in said
    assert "whether that is more than noise is not known" in told(runs[1:3] + runs[:1])
    assert "covers" not in said
    assert "Holm" not in said


def test_a_metric_that_is_no_mean_is_compared_as_well(record, lora):
    def by_f1(tree):
        tree["metric"] = "f1"

    runs = [
        record("head", {"method": "head"}, 0.5, edit=by_f1),
        record("full", {"method": "full"}, 0.95, edit=by_f1),
    ]
    assert "Beside full: worse by more than the noise: head (0.45)." in told(runs)


def test_several_seeds_have_an_interval(record, lora):
    runs = [record("LoRA r=2", lora(2), p, seed=s) for s, p in enumerate((0.80, 0.81, 0.82))]
    half = 4.302652729911275 * 0.01 / math.sqrt(3)
    wanted = f"accuracy 81.0 % on 872 evaluation rows (mean of 3 seeds, ± {100 * half:.1f} points"
    assert wanted in told(runs)


def test_scores_of_the_last_step_are_not_called_optimistic(record, lora):
    runs = [
        record("LoRA r=2", lora(2), edit=lambda m: m["config"].update(select="last")),
        record("LoRA r=4", lora(4)),
    ]
    assert "optimistic" in told(runs)
    assert "optimistic" not in told(runs[:1])


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
