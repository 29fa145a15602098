"""Seeds gathered into settings, standard errors against simulation, and comparisons."""

import math

import numpy as np
import pytest

from rankwise.lab.settings import compare, differences, group_runs, higher_is_better, pareto


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


def test_the_spread_over_seeds_is_added(record):
    scores = [0.70, 0.72, 0.77]
    setting = one_of(
        [record("head", {"method": "head"}, s, seed=i, rows=500) for i, s in enumerate(scores)]
    )
    mean = np.mean(scores)
    between = np.var(scores, ddof=1) / 3
    assert setting.standard_error == pytest.approx(math.sqrt(mean * (1 - mean) / 500 + between))


def judged_by(metric):
    return lambda m: m.update(metric=metric)


def test_other_metrics_have_an_error_only_over_seeds(record):
    runs = [
        record("head", {"method": "head"}, s, seed=i, edit=judged_by("f1"))
        for i, s in enumerate([0.70, 0.74])
    ]
    assert one(runs[0]).standard_error is None
    assert one_of(runs).standard_error == pytest.approx(np.std([0.67, 0.71], ddof=1) / math.sqrt(2))


@pytest.mark.parametrize(
    "edit",
    [lambda m: m["metrics"].update(accuracy=None), lambda m: m["data"].update(eval=None)],
)
def test_there_is_no_error_without_a_score_or_rows(record, edit):
    assert one(record("head", {"method": "head"}, edit=edit)).standard_error is None


def test_a_score_of_one_has_no_error(record):
    assert one(record("head", {"method": "head"}, 1.0)).standard_error == 0.0


# --- comparisons ---------------------------------------------------------------------------------


def test_a_comparison_is_clear_from_twice_the_error_on(record, lora):
    head = one(record("head", {"method": "head"}, 0.70, rows=1000))
    near = one(record("LoRA r=1", lora(1), 0.73, rows=1000))
    far = one(record("LoRA r=2", lora(2), 0.75, rows=1000))
    error = math.sqrt(0.7 * 0.3 / 1000 + 0.73 * 0.27 / 1000)
    found = compare(head, near)
    assert (found.better, found.worse) == (near, head)
    assert found.difference == pytest.approx(0.03)
    assert found.standard_error == pytest.approx(error)
    assert not found.clear
    assert compare(far, head).clear
    assert compare(head, far).clear


def test_equal_scores_are_never_clear(record, lora):
    settings = group_runs([record("head", {"method": "head"}, 1.0), record("b", lora(1), 1.0)])
    assert not compare(*settings).clear


def test_without_an_error_nothing_is_clear(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.1, edit=judged_by("f1")),
        record("LoRA", lora(8), 0.9, edit=judged_by("f1")),
    ]
    found = compare(*group_runs(runs))
    assert found.better.label == "LoRA"
    assert found.standard_error is None
    assert not found.clear


def test_a_loss_is_better_when_it_is_lower(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.5, edit=judged_by("loss")),
        record("LoRA", lora(8), 0.9, edit=judged_by("loss")),
    ]
    head, low = group_runs(runs)
    assert low.score < head.score
    assert low.better_by(head) == pytest.approx(0.4)
    assert compare(head, low).better is low
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
