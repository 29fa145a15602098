"""Conversations in OpenAI's and ShareGPT's spelling, and what is wrong with others."""

import pytest

from rankwise.data.messages import read_messages, text_problem, turn

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def test_openai_s_spelling():
    assert read_messages([USER, ANSWER], True) == ([USER, ANSWER], "")
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert read_messages([{"role": "user", "content": parts}, ANSWER], True)[0][0] == USER


def test_sharegpt_s_spelling():
    value = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
    ]
    assert read_messages(value, True) == (
        [{"role": "system", "content": "be kind"}, USER, ANSWER],
        "",
    )


def test_other_keys_are_left_out():
    assert read_messages([{**ANSWER, "weight": 1}], True) == ([ANSWER], "")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "is missing"),
        ("hi", "is a str, not a list of messages"),
        ([], "has no messages"),
        (["hi"], "message 1 is a str"),
        ([USER, {"role": "assistant"}], "message 2 'content' is missing"),
        ([{"role": "assistant", "content": " "}], "message 1 'content' is empty"),
        ([{"role": "narrator", "content": "x"}], "the role 'narrator'; known are system"),
        ([{"content": "x"}], "the role None"),
        ([{"role": ["user"], "content": "x"}], "the role ['user']"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "holds more than text"),
        ([{"role": "assistant", "content": 3}], "is a int, not text"),
        ([USER], "no assistant message"),
    ],
)
def test_what_is_wrong_is_said(value, words):
    messages, problem = read_messages(value, True)
    assert messages == [] or problem
    assert words in problem


def test_an_answer_may_be_absent_for_prediction():
    assert read_messages([USER], False) == ([USER], "")


def test_a_turn_puts_the_context_below_the_question():
    assert turn("Sum up.", "A long text.", "Short.") == [
        {"role": "user", "content": "Sum up.\n\nA long text."},
        {"role": "assistant", "content": "Short."},
    ]
    assert turn("Hi", " ", None) == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fine", ""),
        ("schön 🙂", ""),
        (None, "missing"),
        (3.5, "is a float, not text"),
        ("\u00a0\n", "is empty"),
        ("a\0b", "NUL"),
        ("half \ud83d", "surrogate"),
    ],
)
def test_what_keeps_a_value_from_being_text(value, words):
    problem = text_problem(value)
    assert words in problem
    assert bool(problem) == bool(words)
