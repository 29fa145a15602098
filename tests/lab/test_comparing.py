"""The reference, the gap and the smallest update that is enough."""

import numpy as np
import pytest

from rankwise.errors import UserError
from rankwise.lab.comparing import (
    best_of,
    between,
    comparisons,
    gap_closed,
    reference_of,
    smallest_first,
    smallest_not_told_apart,
)
from rankwise.lab.settings import against, compare, group_runs


def gaps_of(runs):
    settings = group_runs(runs)
    return gap_closed(settings, comparisons(settings))


def test_the_reference_is_full_fine_tuning_then_the_head_then_the_largest(record, lora):
    head = record("head", {"method": "head"})
    full = record("full", {"method": "full"})
    small, large = record("LoRA r=1", lora(1)), record("LoRA r=4", lora(4))

    def reference(*runs, named=None):
        return reference_of(group_runs(runs), named).label

    assert reference(head, small, full) == "full"
    assert reference(head, small) == "head"
    assert reference(small, large) == "LoRA r=4"
    assert reference(head, small, full, named="LoRA r=1") == "LoRA r=1"
    assert reference(head, small, full, named="head") == "head"
    assert reference_of([]) is None
    with pytest.raises(UserError, match="There are: head, full"):
        reference(head, full, named="nothing like it")


def test_everything_else_is_compared_with_the_reference(sweep):
    settings = group_runs(sweep)
    made = comparisons(settings)
    assert [c.setting.label for c in made] == [s.label for s in settings[:-1]]
    assert {c.reference.label for c in made} == {"full fine-tuning"}
    assert comparisons([]) == []


def test_two_settings_are_beside_each_other_as_the_page_has_it(sweep):
    settings = group_runs(sweep)
    made = comparisons(settings)
    head, full = best_of(settings, "head"), best_of(settings, "full")
    assert between(full, head, made) is made[0]
    eight = next(s for s in settings if s.label == "LoRA r=8")
    assert between(eight, head, made) == compare(eight, head)


def test_the_gap_is_shared_out(record, lora):
    gaps = gaps_of(
        [
            record("head", {"method": "head"}, 0.6, rows=10_000),
            record("LoRA r=1", lora(1), 0.6, rows=10_000),
            record("LoRA r=2", lora(2), 0.75, rows=10_000),
            record("LoRA r=4", lora(4), 0.84, rows=10_000),
            record("full", {"method": "full"}, 0.8, rows=10_000),
        ]
    )
    assert [gap.setting.label for gap in gaps] == ["LoRA r=1", "LoRA r=2", "LoRA r=4"]
    assert [gap.share for gap in gaps] == pytest.approx([0.0, 0.75, 1.2])


def test_the_error_of_the_share_is_that_of_the_bootstrap_over_rows(record, lora):
    runs = [
        record("head", {"method": "head"}, 0.6, rows=2000),
        record("LoRA r=2", lora(2), 0.75, rows=2000),
        record("full", {"method": "full"}, 0.8, rows=2000),
    ]
    (gap,) = gaps_of(runs)
    rng = np.random.default_rng(0)
    right = np.stack([run.answers.labels == run.answers.predictions for run in runs])
    counts = rng.multinomial(2000, np.full(2000, 1 / 2000), size=4000)
    head, mid, full = (counts @ own for own in right.astype(float))
    drawn = (mid - head) / (full - head)
    assert gap.noise.standard_error == pytest.approx(np.std(drawn), rel=0.05)


@pytest.mark.parametrize(("head", "full"), [(0.70, 0.73), (0.8, 0.5)])
def test_no_share_of_a_gap_that_is_not_there(record, lora, head, full):
    runs = [
        record("head", {"method": "head"}, head, rows=200),
        record("LoRA r=2", lora(2), 0.72, rows=200),
        record("full", {"method": "full"}, full, rows=200),
    ]
    assert gaps_of(runs) == []
    assert gaps_of(runs[:2]) == []


def test_the_smallest_is_the_first_that_the_best_does_not_beat(sweep):
    lora = [s for s in group_runs(sweep) if s.first.rank is not None]
    best = max(lora, key=lambda s: s.score)
    verdicts = {c.setting.label: c.verdict for c in against(best, [s for s in lora if s != best])}
    wanted = next(s for s in lora if verdicts.get(s.label) != "worse")
    assert smallest_not_told_apart(lora) == wanted
    assert wanted is not best
    assert smallest_not_told_apart([]) is None


def test_without_answers_the_best_is_chosen(record, lora):
    runs = [record(f"r={r}", lora(r), 0.7 + r / 100, answered=False) for r in (1, 2, 4)]
    assert smallest_not_told_apart(group_runs(runs)).label == "r=4"


def test_of_updates_of_one_size_the_better_comes_first(record, lora):
    runs = [
        record("head", {"method": "head"}),
        record("a", lora(4, alpha=16.0), 0.78),
        record("b", lora(4), 0.79),
        record("c", lora(2), 0.5),
    ]
    assert [s.label for s in smallest_first(group_runs(runs))] == ["c", "b", "a"]
