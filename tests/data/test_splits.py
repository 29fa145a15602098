"""Held-out rows that leak nothing, and the warning where files do."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.examples import Examples, load_examples
from rankwise.data.splits import leakage, require_same_form, split
from rankwise.errors import UserError


def labelled(rows: list[tuple[str, int]], source: str = "train.tsv", **rest) -> Examples:
    return Examples(
        *("classification", source, list(range(2, len(rows) + 2))),
        texts=[text for text, _ in rows],
        labels=[label for _, label in rows],
        label_names=("a", "b", "c"),
        **rest,
    )


def texts(*rows: str, source: str = "a.txt") -> Examples:
    return Examples("causal-lm", source, list(range(1, len(rows) + 1)), texts=list(rows))


# --- split ---------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), st.integers(0, 2)), min_size=2),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
)
def test_rows_are_shared_out_and_nothing_leaks(rows, fraction, seed):
    examples = labelled(rows)
    if all(n == 1 for n in Counter(label for _, label in dict(reversed(rows)).items()).values()):
        with pytest.raises(UserError, match="too few different rows"):
            split(examples, fraction, seed)
        return
    train, held = split(examples, fraction, seed)
    assert sorted(train.lines + held.lines) == examples.lines
    assert train.lines == sorted(train.lines)
    assert held.lines == sorted(held.lines)
    assert leakage(train, held).count == 0
    assert split(examples, fraction, seed) == (train, held)


def test_every_class_is_split_by_itself():
    rows = [(f"text {i}", 0 if i < 900 else 1 if i < 990 else 2) for i in range(1000)]
    train, held = split(labelled(rows), 0.1, 0)
    assert Counter(held.labels) == {0: 90, 1: 9, 2: 1}
    assert Counter(train.labels) == {0: 810, 1: 81, 2: 9}
    assert train.label_names == held.label_names == ("a", "b", "c")


def test_a_rare_class_is_on_both_sides():
    rows = [*((f"text {i}", 0) for i in range(50)), ("x", 1), ("y", 1), ("z", 2)]
    train, held = split(labelled(rows), 0.01, 0)
    assert Counter(held.labels) == {0: 1, 1: 1}
    assert set(train.labels) == {0, 1, 2}


def test_other_seeds_hold_out_other_rows():
    rows = [(f"text {i}", i % 2) for i in range(100)]
    held = {str(split(labelled(rows), 0.2, seed)[1].lines) for seed in range(4)}
    assert len(held) == 4


def test_rows_without_classes_are_split_too():
    train, held = split(texts(*(f"line {i}" for i in range(40))), 0.25, 0)
    assert (len(train), len(held)) == (30, 10)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_fraction_of_nothing_or_everything_is_refused(fraction):
    with pytest.raises(UserError, match="between 0 and 1"):
        split(texts("a", "b"), fraction, 0)


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match=r"a\.txt has too few different rows \(3 rows\)"):
        split(texts("same", "Same ", "same"), 0.5, 0)


# --- leakage -------------------------------------------------------------------------------------


def test_shared_rows_are_counted_with_the_first_line():
    train = labelled([("One  film", 0), ("two films", 1)])
    dev = labelled([("new", 0), ("one film ", 1), ("TWO films", 1)], source="dev.tsv")
    found = leakage(train, dev)
    assert (found.count, found.rows, found.first) == (2, 3, "dev.tsv:3 is train.tsv:2")
    assert "2 of 3 evaluation rows (66.7%)" in found.note


def test_nothing_shared_gives_no_warning():
    found = leakage(labelled([("one", 0)]), labelled([("two", 0)]))
    assert (found.count, found.first, found.note) == (0, "", "")


def test_a_pair_leaks_only_as_a_pair():
    train = labelled([("one", 0)], pairs=["two"])
    assert leakage(train, labelled([("one", 0)], pairs=["other"])).count == 0
    assert leakage(train, labelled([("one two", 0)], pairs=[""])).count == 0
    assert leakage(train, labelled([("One", 1)], pairs=["two"])).count == 1


def test_prompts_and_conversations_leak_too():
    prompts = [Examples("causal-lm", "x", [1], prompts=[(p, "c\nd")]) for p in ("A", "a")]
    assert leakage(*prompts).count == 1
    chats = [
        Examples("causal-lm", "x", [1], messages=[[{"role": "user", "content": c}]])
        for c in ("hi\n you", "Hi you")
    ]
    assert leakage(*chats).count == 1


def test_what_sst2_s_files_share_is_counted_as_by_hand(shared):
    train = load_examples(shared / "data/sst2/train.tsv")
    dev = load_examples(shared / "data/sst2/dev.tsv", label_names=train.label_names)
    seen = {" ".join(t.lower().split()) for t in train.texts}
    expected = sum(" ".join(t.lower().split()) in seen for t in dev.texts)
    assert leakage(train, dev).count == expected


# --- same form -----------------------------------------------------------------------------------


def test_what_fits_passes_and_what_does_not_is_listed():
    train = labelled([("a", 0)])
    require_same_form(train, labelled([("b", 1)], source="dev.tsv"))
    with pytest.raises(UserError) as caught:
        require_same_form(train, texts("b"))
    message = str(caught.value)
    assert "task: classification in train.tsv, causal-lm in a.txt" in message
    assert "labels:" in message
    with pytest.raises(UserError, match=r"form: text in train\.tsv, pair in dev\.tsv"):
        require_same_form(train, labelled([("a", 0)], source="dev.tsv", pairs=["b"]))
