"""Seeds gathered into settings, standard errors against simulation, and comparisons."""

import math

import numpy as np
import pytest
from scipy import stats

from rankwise.lab.noise import holm
from rankwise.lab.settings import (
    against,
    compare,
    corrected,
    differences,
    group_runs,
    higher_is_better,
    pareto,
)


def one(run):
    (setting,) = group_runs([run])
    return setting


def test_runs_that_differ_in_their_seed_alone_are_one_setting(record, lora):
    runs = [
        record(f"LoRA r=8, seed {s}", lora(8), score, seed=s)
        for s, score in ((10, 0.70), (2, 0.72), (0, 0.74))
    ]
    setting = one_of(runs)
    assert setting.label == "LoRA r=8"
    assert [run.seed for run in setting.runs] == [0, 2, 10]
    assert setting.score == pytest.approx(0.72)
    assert setting.seconds == pytest.approx(runs[0].seconds["train"])


def one_of(runs):
    (setting,) = group_runs(runs)
    return setting


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["config"].update(lr=0.5),
        lambda m: m["base"].update(fingerprint="other"),
        lambda m: m["data"]["train"].update(fingerprint="other"),
    ],
)
def test_runs_that_differ_in_more_are_settings_of_their_own(record, lora, edit):
    runs = [record("LoRA r=8", lora(8)), record("LoRA r=8", lora(8), seed=1, edit=edit)]
    labels = [setting.label for setting in group_runs(runs)]
    assert len(set(labels)) == 2


def test_the_folder_does_not_make_a_setting(record):
    runs = [
        record("head", {"method": "head"}, seed=s, edit=lambda m: m["config"].update(out=m["seed"]))
        for s in (0, 1)
    ]
    assert len(one_of(runs).runs) == 2


def test_the_same_seed_twice_is_no_repetition(record):
    runs = [record("head", {"method": "head"}) for _ in range(3)]
    settings = group_runs([*runs, record("head", {"method": "head"}, seed=1)])
    assert [s.label for s in settings] == ["head", "head #2", "head #3"]
    assert [[run.seed for run in s.runs] for s in settings] == [[0, 1], [0], [0]]


def test_the_same_name_is_told_apart_by_what_differs(record, lora):
    runs = [
        record("LoRA r=8", lora(8)),
        record("LoRA r=8", lora(8, target_modules=["all-linear"], adapted=["a", "b"])),
        record("LoRA r=4", lora(4)),
    ]
    labels = {setting.label for setting in group_runs(runs)}
    assert labels == {"LoRA r=4", "LoRA r=8 (query, value)", "LoRA r=8 (all-linear)"}


def test_differences_are_the_options_that_differ(record, lora):
    def with_lr(lr):
        return lambda m: m["config"].update(lr=lr)

    runs = [record("a", lora(8), edit=with_lr(0.1)), record("b", lora(4), edit=with_lr(0.2))]
    assert differences(runs) == ["alpha = 16.0, lr = 0.1, r = 8", "alpha = 8.0, lr = 0.2, r = 4"]
    assert differences(runs, but=("r", "alpha")) == ["lr = 0.1", "lr = 0.2"]
    assert differences(runs[:1]) == [""]
    unset = [record("a", lora(8, init=None)), record("b", lora(8, init="gaussian"))]
    assert differences(unset) == ["init not set", "init = gaussian"]


def test_what_is_not_finished_says_so(record):
    setting = one(record("head", {"method": "head"}, edit=lambda m: m.update(status="interrupted")))
    assert setting.label == "head (interrupted)"
    assert not setting.usable


def test_the_order_of_the_runs_given_does_not_matter(sweep):
    assert group_runs(sweep[::-1]) == group_runs(sweep)


# --- standard errors -----------------------------------------------------------------------------


def test_the_standard_error_of_an_accuracy_is_that_of_its_rows(record):
    setting = one(record("head", {"method": "head"}, 0.7, rows=500))
    drawn = np.random.default_rng(0).binomial(500, 0.7, size=200_000) / 500
    assert setting.standard_error == pytest.approx(drawn.std(), rel=0.01)
    bare = one(record("head", {"method": "head"}, 0.7, rows=500, answered=False))
    assert bare.standard_error == pytest.approx(drawn.std(), rel=0.01)


def test_the_spread_over_seeds_is_added(record):
    scores = [0.70, 0.72, 0.77]
    runs = [record("head", {"method": "head"}, s, seed=i, rows=500) for i, s in enumerate(scores)]
    right = np.stack([run.answers.labels == run.answers.predictions for run in runs], axis=1)
    between = np.var(scores, ddof=1) / 3
    rows = right.mean(axis=1).var(ddof=1) / 500
    assert one_of(runs).standard_error == pytest.approx(math.sqrt(rows + between))
    assert one_of(runs).interval == pytest.approx(stats.t.isf(0.025, 2) * math.sqrt(between))
    assert one(runs[0]).interval is None


def test_without_answers_the_rows_count_in_full(record):
    scores = [0.70, 0.72, 0.77]
    setting = one_of(
        [
            record("head", {"method": "head"}, s, seed=i, rows=500, answered=False)
            for i, s in enumerate(scores)
        ]
    )
    mean = np.mean(scores)
    between = np.var(scores, ddof=1) / 3
    assert setting.standard_error == pytest.approx(math.sqrt(mean * (1 - mean) / 500 + between))


def judged_by(metric):
    return lambda m: m.update(metric=metric)


def test_without_answers_other_metrics_have_an_error_only_over_seeds(record):
    runs = [
        record("head", {"method": "head"}, s, seed=i, edit=judged_by("f1"), answered=False)
        for i, s in enumerate([0.70, 0.74])
    ]
    assert one(runs[0]).standard_error is None
    assert one_of(runs).standard_error == pytest.approx(np.std([0.67, 0.71], ddof=1) / math.sqrt(2))


def test_with_answers_other_metrics_have_one_over_rows(record):
    run = record("head", {"method": "head"}, 0.7, rows=500, edit=judged_by("loss"))
    losses = run.answers.losses
    assert one(run).standard_error == pytest.approx(losses.std(ddof=1) / math.sqrt(500))


@pytest.mark.parametrize(
    "edit",
    [lambda m: m["metrics"].update(accuracy=None), lambda m: m["data"].update(eval=None)],
)
def test_there_is_no_error_without_a_score_or_rows(record, edit):
    assert one(record("head", {"method": "head"}, edit=edit)).standard_error is None


def test_a_score_of_one_has_no_error(record):
    assert one(record("head", {"method": "head"}, 1.0)).standard_error == 0.0


def test_peak_memory_is_known_when_every_run_knows_it(record):
    def forgets(tree):
        tree["memory"] = None

    runs = [record("head", {"method": "head"}, seed=s) for s in (0, 1)]
    assert one_of(runs).peak_bytes == runs[0].peak_bytes
    runs.append(record("head", {"method": "head"}, seed=2, edit=forgets))
    assert one_of(runs).peak_bytes is None


# --- comparisons ---------------------------------------------------------------------------------


def right(run):
    return (run.answers.labels == run.answers.predictions).astype(float)


def test_a_comparison_is_the_paired_test_over_the_rows(record, lora):
    head = one(record("head", {"method": "head"}, 0.70, rows=1000))
    near = one(record("LoRA r=1", lora(1), 0.71, rows=1000))
    far = one(record("LoRA r=2", lora(2), 0.75, rows=1000))
    found = compare(far, head)
    wanted = stats.ttest_rel(right(far.first), right(head.first))
    assert (found.setting, found.reference) == (far, head)
    assert found.difference == pytest.approx(0.05)
    assert found.p == found.corrected == pytest.approx(wanted.pvalue)
    assert (found.clear, found.verdict) == (True, "better")
    back = compare(head, far)
    assert back.difference == pytest.approx(-0.05)
    assert (back.p, back.verdict) == (pytest.approx(found.p), "worse")
    assert compare(near, head).verdict == "not told apart"


def test_seeds_that_differ_widen_the_noise(record, lora):
    head = one_of(
        [record("head", {"method": "head"}, p, seed=s) for s, p in enumerate([0.70, 0.70, 0.70])]
    )
    steady = one_of([record("a", lora(1), 0.74, seed=s) for s in range(3)])
    wild = one_of([record("b", lora(2), p, seed=s) for s, p in enumerate([0.70, 0.74, 0.78])])
    assert compare(steady, head).verdict == "better"
    assert compare(wild, head).verdict == "not told apart"


def test_holms_correction_is_over_all_that_were_compared(record, lora):
    head = one(record("head", {"method": "head"}, 0.70, rows=1000))
    others = [one(record(f"LoRA r={r}", lora(r), 0.72 + r / 200, rows=1000)) for r in (1, 2, 4)]
    alone = [compare(other, head).p for other in others]
    assert [c.p for c in against(head, others)] == alone
    assert [c.corrected for c in against(head, others)] == holm(alone)
    assert against(head, []) == []


def test_comparisons_of_several_references_are_corrected_together(record, lora):
    runs = [one(record(f"LoRA r={r}", lora(r), 0.7 + r / 100, rows=1000)) for r in (1, 2, 4, 8)]
    bare = one(record("bare", lora(16), 0.9, answered=False))
    pairs = [compare(runs[1], runs[0]), compare(bare, runs[0]), compare(runs[3], runs[2])]
    known = holm([pairs[0].p, pairs[2].p])
    assert [c.corrected for c in corrected(pairs)] == [known[0], None, known[1]]
    assert [c.reference for c in corrected(pairs)] == [runs[0], runs[0], runs[2]]


def test_equal_scores_are_never_clear(record, lora):
    settings = group_runs([record("head", {"method": "head"}, 1.0), record("b", lora(1), 1.0)])
    assert not compare(*settings).clear


def test_without_answers_nothing_is_clear(record, lora):
    head = one(record("head", {"method": "head"}, 0.1))
    bare = one(record("LoRA", lora(8), 0.9, answered=False))
    found = compare(bare, head)
    assert found.difference == pytest.approx(0.8)
    assert (found.noise, found.p, found.clear, found.verdict) == (None, None, False, "not known")
    both = against(head, [bare, one(record("LoRA", lora(4), 0.9))])
    assert [c.verdict for c in both] == ["not known", "better"]
    assert both[1].corrected == both[1].p  # nothing is corrected for what was not tested


def test_answers_to_other_rows_are_not_paired(record, lora):
    head = one(record("head", {"method": "head"}, 0.5, rows=100))
    other = one(record("LoRA", lora(8), 0.9, rows=80))
    assert compare(head, other).noise is None


def test_a_loss_is_better_when_it_is_lower(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.5, edit=judged_by("loss")),
        record("LoRA", lora(8), 0.9, edit=judged_by("loss")),
    ]
    head, low = group_runs(runs)
    assert low.score < head.score
    assert low.better_by(head) == pytest.approx(0.4)
    assert compare(low, head).verdict == "better"
    assert higher_is_better("accuracy")
    assert not higher_is_better("perplexity")


# --- the Pareto frontier -------------------------------------------------------------------------


def dominated(setting, others):
    """Whether another setting is no larger and no worse, and in one of the two better."""
    for other in others:
        smaller = setting.first.counts.trainable - other.first.counts.trainable
        gain = other.better_by(setting)
        if smaller >= 0 and gain >= 0 and (smaller > 0 or gain > 0):
            return True
    return False


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_frontier_is_what_nothing_dominates(record, lora, metric):
    rng = np.random.default_rng(1)
    runs = [
        record(
            f"LoRA {i}",
            lora(int(rng.choice([1, 2, 4, 8, 16])), dropout=i / 100),
            float(rng.uniform(0.5, 0.9)),
            edit=judged_by(metric),
        )
        for i in range(20)
    ]
    settings = group_runs(runs)
    wanted = [s.label for s in settings if not dominated(s, settings)]
    assert sorted(s.label for s in pareto(settings)) == sorted(wanted)
    sizes = [s.first.counts.trainable for s in pareto(settings)]
    assert sizes == sorted(sizes)
