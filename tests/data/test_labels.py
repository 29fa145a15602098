"""Labels as classes and as quantities, in the ways that files write them."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.labels import infer_task, read_classes, read_numbers
from rankwise.data.table import Table


def column(*values: object) -> Table:
    rows = [{"label": v} for v in values]
    return Table("d.tsv", ("label",), rows, list(range(2, 2 + len(rows))))


@pytest.mark.parametrize(
    ("values", "names", "classes"),
    [
        (["1", "0", "1"], ("0", "1"), [1, 0, 1]),
        ([1, 0, 1], ("0", "1"), [1, 0, 1]),
        (["10", "9", "-1"], ("-1", "9", "10"), [2, 1, 0]),
        ([1.0, 0.0], ("0", "1"), [1, 0]),
        (["1.0", "0"], ("0", "1"), [1, 0]),
        ([True, False], ("false", "true"), [1, 0]),
        (["neg", " pos ", "neg"], ("neg", "pos"), [0, 1, 0]),
        (["10", "9", "x"], ("10", "9", "x"), [0, 1, 2]),
        (["+", "-"], ("+", "-"), [0, 1]),
        (["-", "x"], ("-", "x"), [0, 1]),
    ],
)
def test_classes_of_a_train_file(values, names, classes):
    read = read_classes(column(*values), "label", None)
    assert (read.names, read.values, read.dropped, read.problems) == (names, classes, [], [])


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=30))
def test_whole_numbers_are_in_numerical_order_however_they_are_written(numbers):
    spell = random.Random(0)
    written = [spell.choice([n, str(n), float(n), f"{n}.0", f" {n} "]) for n in numbers]
    read = read_classes(column(*written), "label", None)
    assert [int(name) for name in read.names] == sorted(set(numbers))
    assert [int(read.names[v]) for v in read.values if v is not None] == numbers


@pytest.mark.parametrize(
    ("known", "values", "classes"),
    [
        (("0", "1"), ["1", 0, 1.0, "1.0", " 0"], [1, 0, 1, 1, 0]),
        (("neg", "pos"), ["POS", "neg"], [1, 0]),
        (("false", "true"), [True, "False", "TRUE"], [1, 0, 1]),
        (("a", "A"), ["A", "a"], [1, 0]),
        (("b", "a"), ["a", "b"], [1, 0]),
        (("1", "1.0"), ["1", "1.0"], [0, 1]),
    ],
)
def test_classes_of_an_evaluation_file_are_the_train_files(known, values, classes):
    read = read_classes(column(*values), "label", known)
    assert read.names == known
    assert read.values == classes
    assert read.problems == []


def test_a_label_unknown_in_the_test_file_names_the_line_and_the_known_ones():
    read = read_classes(column("pos", "neutral", "negg"), "label", ("neg", "pos"))
    assert read.values == [1, None, None]
    assert len(read.problems) == 2
    assert read.problems[0].startswith("d.tsv:3: label 'label' 'neutral' is not one of the known")
    assert "'neg', 'pos'" in read.problems[0]
    assert "Did you mean 'neg'?" in read.problems[1]


def test_a_name_in_another_case_is_not_guessed_where_two_fit():
    read = read_classes(column("YES"), "label", ("Yes", "yes", "no"))
    assert "is not one of the known" in read.problems[0]


@pytest.mark.parametrize("absent", [None, "", "  ", math.nan])
def test_missing_labels(absent):
    read = read_classes(column("a", absent, "b"), "label", None)
    assert read.problems == ["d.tsv:3: label 'label' is missing"]
    numbers = read_numbers(column(1.5, absent), "label")
    assert numbers.values == [1.5, None]
    assert numbers.problems == ["d.tsv:3: label 'label' is missing"]


def test_labels_of_a_wrong_type():
    read = read_classes(column("a", ["b"], {"c": 1}), "label", None)
    assert "is a list, not a class name or number" in read.problems[0]
    assert "is a dict" in read.problems[1]


def test_rows_without_agreement_are_dropped_not_refused():
    values = ["entailment", "-", "neutral", "contradiction", "-"]
    read = read_classes(column(*values), "label", None)
    assert read.names == ("contradiction", "entailment", "neutral")
    assert read.dropped == [1, 4]
    assert read.problems == []
    assert read_classes(column(*values), "label", read.names).dropped == [1, 4]
    assert read_classes(column("-"), "label", ("+", "-")).dropped == []


def test_quantities():
    read = read_numbers(column("3.8", 2, 0.5, " 4 ", "-1e-3"), "label")
    assert read.values == [3.8, 2.0, 0.5, 4.0, -0.001]
    assert read.problems == []


@pytest.mark.parametrize("wrong", ["high", "nan", "inf", math.inf, True, [1.0], "1,5", 10**400])
def test_quantities_that_are_no_finite_numbers(wrong):
    read = read_numbers(column(1.0, wrong), "label")
    assert read.values == [1.0, None]
    assert read.problems[0].startswith("d.tsv:3: ")


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (["0", "1"], "classification"),
        ([0, 1], "classification"),
        ([0.0, 1.0, None], "classification"),
        (["3.8", "5"], "regression"),
        ([0.5, 1], "regression"),
        (["3.8", "4.2", "n/a"], "regression"),
        (["v1.5", "3.5", "pos"], "classification"),
        ([True, False], "classification"),
        ([], "classification"),
    ],
)
def test_the_task_is_told_from_the_labels(values, task):
    assert infer_task(values) == task
