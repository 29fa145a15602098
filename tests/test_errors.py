"""Errors: exit codes, gathered problems and hints of the nearest names."""

import pytest

from rankwise.errors import (
    ArtifactError,
    EnvironmentFault,
    RankwiseError,
    UserError,
    gather,
    nearest,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [(RankwiseError, 1), (UserError, 2), (ArtifactError, 3), (EnvironmentFault, 4)],
)
def test_each_kind_has_its_exit_code_and_one_base(kind: type[RankwiseError], code: int):
    assert kind.exit_code == code
    assert issubclass(kind, RankwiseError)


def test_a_users_mistake_is_a_value_error_too():
    with pytest.raises(ValueError, match="wrong"):
        raise UserError("wrong")
    assert not issubclass(ArtifactError, ValueError)


def test_gather_without_problems_raises_nothing():
    gather(UserError, "title", [])


def test_gather_puts_one_problem_on_the_titles_line():
    with pytest.raises(ArtifactError) as caught:
        gather(ArtifactError, "The file is damaged", ["it is empty."])
    assert str(caught.value) == "The file is damaged: it is empty."


def test_gather_lists_several_problems_and_counts_those_past_the_limit():
    with pytest.raises(UserError) as caught:
        gather(UserError, "Wrong", [f"problem {i}" for i in range(5)], limit=3)
    assert str(caught.value).splitlines() == [
        "Wrong:",
        "  - problem 0",
        "  - problem 1",
        "  - problem 2",
        "  - and 2 more",
    ]


def test_gather_writes_out_exactly_the_limit_without_counting():
    with pytest.raises(UserError) as caught:
        gather(UserError, "Wrong", ["a", "b"], limit=2)
    assert "more" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "candidates", "hint"),
    [
        ("qeury", ["dense", "query", "value"], " Did you mean 'query'?"),
        ("q_porj", ["q_proj", "q_prod"], " Did you mean 'q_proj' or 'q_prod'?"),
        ("aab", ["aab1", "aab2", "aab3"], " Did you mean 'aab3', 'aab2' or 'aab1'?"),
        ("QUERY", ["query"], " Did you mean 'query'?"),
        ("wqkv", ["Wqkv"], " Did you mean 'Wqkv'?"),
        ("zzz", ["query"], ""),
        ("query", [], ""),
    ],
)
def test_nearest_names_what_was_meant(name: str, candidates: list[str], hint: str):
    assert nearest(name, candidates) == hint


def test_nearest_names_a_repeated_candidate_once():
    assert nearest("qeury", ["query"] * 5) == " Did you mean 'query'?"
