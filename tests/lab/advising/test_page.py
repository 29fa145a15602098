"""An advice in words: what is enough, what is not, and what the rows cannot tell."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rankwise.lab.advising import Advice, Step, Trial, summary
from rankwise.lab.advising.page import quality_by_size
from rankwise.lab.advising.records import EVERY_LAYER, PER_LAYER


def trial(kind: str, size: int, parameters: int, *, lost: float, enough: bool) -> Trial:
    return Trial(
        kind=kind,
        size=size,
        ranks={"a": size, "b": size // 2},
        parameters=parameters,
        error=0.1,
        score=0.9 - lost,
        lost=lost,
        low=lost - 0.01,
        high=lost + 0.01,
        loss_back=lost / 2,
        enough=enough,
    )


@pytest.fixture
def advice() -> Advice:
    trials = (
        trial(EVERY_LAYER, 1, 100, lost=0.1, enough=False),
        trial(EVERY_LAYER, 2, 200, lost=0.05, enough=False),
        trial(EVERY_LAYER, 3, 300, lost=0.0, enough=True),
        trial(EVERY_LAYER, 4, 400, lost=0.0, enough=True),
        trial(PER_LAYER, 6, 150, lost=0.005, enough=True),
    )
    return Advice("out", "accuracy", 480, (), 32, 3200, 0.9, 0.5, True, (2, 3, 3), trials)


def test_the_smaller_of_both_kinds_is_advised(advice: Advice) -> None:
    told = " ".join(summary(advice))
    assert "accuracy 90.0 % on 480 tuning rows; without its updates it has 50.0 %." in told
    assert "r = 3 in every layer (300 parameters) is enough" in told
    assert (
        "r = 2 is not enough: it loses 5.0 points (4.0 to 6.0 over other rows) and 2.5 % of" in told
    )
    assert "Ranks of 3 to 6, chosen layer by layer (150 parameters), are enough" in told
    assert "Advised: ranks by layer, 150 parameters, 4.69 % of the probe's." in told
    assert "fall most behind k = 2 to 3, 3 in the median" in told


def test_no_gain_and_no_cut_are_said(advice: Advice) -> None:
    none = replace(advice, trials=advice.trials[:2])
    told = " ".join(summary(none))
    assert "No cut is as good as the probe" in told
    assert "--r 64" in told
    nothing = replace(advice, gained=False)
    told = " ".join(summary(nothing))
    assert "no more than the noise" in told
    assert "No rank is advised; the configuration has the probe's own, r = 32." in told
    assert "enough" not in told
    assert nothing.chosen is None


def test_a_larger_probe_that_is_no_better_is_said(advice: Advice) -> None:
    step = Step(
        r=32,
        larger=64,
        larger_score=0.91,
        score=0.9,
        lost=0.01,
        low=-0.01,
        high=0.03,
        loss_back=0.02,
        enough=True,
    )
    whole = trial(EVERY_LAYER, 32, 3200, lost=0.0, enough=True)
    kept = replace(advice, steps=(step,), trials=(*advice.trials[:2], whole))
    told = " ".join(summary(kept))
    assert "Half the ranks of a probe of r = 32 are not enough." in told
    assert (
        "A probe of r = 64 is no better (accuracy 91.0 %, and 90.0 % with r = 32): beside it "
        "r = 32 loses 1.0 points (-1.0 to 3.0 over other rows) and 2 % of what" in told
    )
    assert told.endswith("No cut is as good as the probe. Advised: r = 32, all of it.")
    assert kept.chosen == whole
    left = replace(advice, steps=(replace(step, r=16, larger=32, enough=False),))
    told = " ".join(summary(left))
    assert "A probe of r = 32 is better (accuracy 91.0 %, and 90.0 % with r = 16)" in told
    assert "r = 3 in every layer (300 parameters) is enough" in told


def test_the_figure_has_every_trial(advice: Advice) -> None:
    figure = quality_by_size(advice)
    assert len(figure.rows) == 5
    assert {row[8] for row in figure.rows} == {"True", "False"}
