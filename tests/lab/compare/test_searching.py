"""What the page tells of the searches: edges, runs without a score, and methods without a rate."""

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from rankwise.lab.compare.searching import Found, searching
from rankwise.lab.compare.tuning import Settled


@pytest.fixture
def made(record, lora):
    """A search with given scores by rate."""

    def make(name, method, scores, settled):
        def without(tree):
            tree.update(status="failed", metrics={}, diverged=True)

        def run(score):
            if math.isnan(score):
                return record(name, method, edit=without)
            return record(name, method, score)

        return Found(name, tuple((rate, run(s)) for rate, s in scores.items()), settled)

    return make


def told(searches, pinned, head_rate=0.01):
    return "\n".join(searching(searches, pinned, head_rate).sentences)


def test_a_search_that_ends_inside_is_told(made, compared):
    found = made("head", {"method": "head"}, {1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.6}, Settled(3e-3))
    section = searching([found], compared.pinned, 0.01)
    assert "Every search ended with its best rate inside" in section.sentences[-1]
    assert not [s for s in section.sentences if "LoRA" in s]
    (figure,) = section.figures
    assert [row[4] for row in figure.rows] == ["no", "yes", "no"]
    texts = [e.text for e in ET.fromstring(figure.svg).iter("text")]
    assert {"0.001", "0.003", "0.01"} <= set(texts)


def test_what_stays_at_the_edge_is_told(made, compared, lora):
    edge = made("LoRA r=2", lora(2), {1e-3: 0.5, 3e-3: 0.7}, Settled(3e-3, at_edge=True))
    assert "still at the edge of its search for LoRA r=2 (0.003)" in told([edge], compared.pinned)


def test_what_diverged_and_what_never_trained_is_told(made, compared):
    one = made("head", {"method": "head"}, {1e-3: 0.5, 3e-3: math.nan}, Settled(1e-3))
    none = made("full", {"method": "full"}, {1e-3: math.nan}, Settled(None, at_edge=True))
    said = told([one, none], compared.pinned)
    assert "as with a loss that was no number: head at 0.003 and full at 0.001." in said
    assert "No rate trained, so there are no runs of it: full." in said


def test_a_search_at_every_rank_is_told(made, compared, lora):
    found = made("LoRA r=2", lora(2), {1e-3: 0.5}, Settled(1e-3))
    own = replace(
        compared.pinned, config=compared.pinned.config.model_copy(update={"search_rank": None})
    )
    assert "LoRA had a search at every rank." in told([found], own)
    assert "LoRA was searched at r = 2 alone" in told([found], compared.pinned)


def test_the_rate_of_the_heads_is_told(made, compared, lora):
    found = made("LoRA r=2", lora(2), {1e-3: 0.5}, Settled(1e-3))
    said = "the output layer of every other method learned at 0.03 (--head-lr), the lowest rate"
    assert said in told([found], compared.pinned, 0.03)
    assert "Head-only training found no rate" in told([found], compared.pinned, None)
    off = compared.pinned.config.model_copy(update={"search_head": False})
    assert "Head-only" not in told([found], replace(compared.pinned, config=off), None)


def test_the_rate_of_the_heads_is_that_of_the_runs(compared):
    beside = [run for run in compared.runs if run.rank is not None]
    assert {run.config["head_lr"] for run in beside} == {compared.head_rate}
    assert f"learned at {compared.head_rate:g} (--head-lr)" in compared.report.read_text("utf-8")


def test_no_search_is_told(compared):
    section = searching([], compared.pinned, None)
    assert "There was no search" in section.sentences[0]
    assert section.figures == ()


def test_many_searches_are_shown_in_parts(made, compared, lora):
    rates = {10.0**-n: 0.5 for n in range(2, 9)}
    searches = [made(k, {"method": k}, rates, Settled(1e-3)) for k in ("head", "full", "bitfit")]
    searches += [made(f"LoRA r={r}", lora(r), rates, Settled(1e-3)) for r in (1, 2, 4)]
    searches += [
        made(f"LoRA r={r} α=16", lora(r, alpha=16.0), rates, Settled(1e-3)) for r in (1, 2, 4)
    ]
    figures = searching(searches, compared.pinned, 0.01).figures
    assert [f.name for f in figures] == ["rates-methods", "rates-ranks-1", "rates-ranks-2"]
    assert [f.title.rpartition(", ")[2] for f in figures[1:]] == ["α = 2·r", "α = 16"]
