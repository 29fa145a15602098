"""Which column is what: by flag, by convention, and by asking when neither says."""

import pytest

from rankwise.data.columns import ColumnNames, Columns, find_columns
from rankwise.data.table import Table
from rankwise.errors import UserError

WORDS = "some words here"


def table(*columns: str, **values: object) -> Table:
    """One row: words in every column that has no value of its own."""
    row = {c: values.get(c, WORDS) for c in columns}
    return Table("data.tsv", columns, [row], [2])


def refused(given: Table, *args: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        find_columns(given, *args, **options)
    return str(caught.value)


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # GLUE and its relatives, as their files name things
        (table("label", "sentence"), Columns(text="sentence", label="label")),
        (table("label", "content"), Columns(text="content", label="label")),
        (table("review", "sentiment"), Columns(text="review", label="sentiment")),
        (table("Text", "LABEL"), Columns(text="Text", label="LABEL")),
        (table("id", "text", "score"), Columns(text="text", label="score")),
        (
            table("Class Index", "Title", "Description"),
            Columns(text="Description", label="Class Index"),
        ),
        (
            table("index", "sentence1_parse", "sentence1", "sentence2", "label1", "gold_label"),
            Columns(text="sentence1", pair="sentence2", label="gold_label"),
        ),
        (
            table("premise", "hypothesis", "label"),
            Columns(text="premise", pair="hypothesis", label="label"),
        ),
        (
            table("qid1", "question1", "question2", "is_duplicate"),
            Columns(text="question1", pair="question2", label="is_duplicate"),
        ),
        (
            table("index", "question", "sentence", "label"),
            Columns(text="question", pair="sentence", label="label"),
        ),
        (
            table("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
            Columns(text="#1 String", pair="#2 String", label="Quality"),
        ),
        (
            table("text", "text_pair", "label"),
            Columns(text="text", pair="text_pair", label="label"),
        ),
        # for language models
        (table("text"), Columns(text="text")),
        (table("id", "text", id="7"), Columns(text="text")),
        (table("prompt", "completion"), Columns(prompt="prompt", completion="completion")),
        (
            table("prompt", "response", "category"),
            Columns(prompt="prompt", completion="response", turns=True),
        ),
        (
            table("instruction", "input", "output", "text"),
            Columns(prompt="instruction", completion="output", turns=True, context="input"),
        ),
        (
            table("instruction", "context", "response", "category"),
            Columns(prompt="instruction", completion="response", turns=True, context="context"),
        ),
        (table("input", "output"), Columns(prompt="input", completion="output", turns=True)),
        (table("question", "answer"), Columns(prompt="question", completion="answer", turns=True)),
        (table("messages", "prompt", messages=CHAT), Columns(messages="messages")),
        (table("conversations", "id", conversations=CHAT), Columns(messages="conversations")),
    ],
)
def test_what_files_call_things(given, expected):
    assert find_columns(given) == expected


def test_the_columns_that_are_read_are_named_in_order():
    assert find_columns(table("label", "sentence")).used() == ("sentence", "label")
    found = find_columns(table("instruction", "input", "output"))
    assert found.used() == ("instruction", "input", "output")


def test_the_only_column_with_words_is_the_text_and_says_so():
    given = table("id", "remark", "age", "label", id="a b", age="7", label="1")
    found = find_columns(given)
    assert (found.text, found.label) == ("remark", "label")
    assert "'remark'" in found.notes[0]


# --- flags ---------------------------------------------------------------------------------------


def test_flags_decide():
    given = table("text", "title", "body", "score", "label")
    wanted = ColumnNames(text="title", label="score")
    assert find_columns(given, wanted) == Columns(text="title", label="score")
    wanted = ColumnNames(text="title", pair="body", label="label")
    assert find_columns(given, wanted) == Columns(text="title", pair="body", label="label")


def test_a_named_text_is_a_single_text():
    given = table("sentence1", "sentence2", "label")
    found = find_columns(given, ColumnNames(text="sentence2"))
    assert found == Columns(text="sentence2", label="label")


def test_the_other_of_a_pair_is_found_by_convention():
    given = table("sentence1", "sentence2", "label")
    found = find_columns(given, ColumnNames(pair="sentence2"))
    assert found == Columns(text="sentence1", pair="sentence2", label="label")
    found = find_columns(table("text", "more", "label"), ColumnNames(pair="more"))
    assert found == Columns(text="text", pair="more", label="label")


def test_prompt_and_completion_by_flag():
    given = table("ask", "say", "label")
    wanted = ColumnNames(prompt="ask", completion="say")
    assert find_columns(given, wanted) == Columns(prompt="ask", completion="say")
    message = refused(given, ColumnNames(prompt="ask"))
    assert "--completion-column" in message
    message = refused(given, ColumnNames(completion="say"))
    assert "--prompt-column" in message


def test_one_of_prompt_and_completion_by_flag_finds_the_other():
    given = table("question", "answer", "response")
    found = find_columns(given, ColumnNames(completion="response"))
    assert found == Columns(prompt="question", completion="response", turns=True)
    found = find_columns(table("prompt", "completion", "response"), ColumnNames(prompt="prompt"))
    assert found == Columns(prompt="prompt", completion="completion")


def test_messages_by_flag():
    given = table("messages", "chat", messages=CHAT, chat=CHAT)
    assert find_columns(given, ColumnNames(messages="chat")) == Columns(messages="chat")


def test_a_named_text_wins_over_prompts_also_for_a_language_model():
    given = table("prompt", "completion", "whole")
    found = find_columns(given, ColumnNames(text="whole"), "causal-lm")
    assert found == Columns(text="whole")


def test_a_flag_that_matches_nothing_gets_the_nearest_name():
    message = refused(table("label", "sentence"), ColumnNames(text="sentense", label="labell"))
    assert "--text-column sentense" in message
    assert "Did you mean 'sentence'?" in message
    assert "--label-column labell" in message
    assert "Did you mean 'label'?" in message


def test_an_evaluation_file_may_name_its_text_differently():
    wanted = ColumnNames(text="sentence", label="label")
    found = find_columns(table("label", "content"), wanted, fallback=True)
    assert (found.text, found.label) == ("content", "label")
    assert "no column 'sentence'" in found.notes[0]


def test_an_evaluation_file_without_any_text_is_still_refused():
    given = table("label", "number", number="7", label="1")
    message = refused(given, ColumnNames(text="sentence"), fallback=True)
    assert "--text-column" in message


# --- when the columns do not say -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "flag"),
    [
        (("text", "content", "label"), "--text-column"),
        (("remark", "verdict", "label"), "--text-column"),
        (("text", "label", "target"), "--label-column"),
        (("text", "lable"), "--label-column"),
        (("question", "sentence", "passage", "label"), "--pair-column"),
        (("prompt", "completion", "label"), "--task"),
        (("sentence1", "sentence2"), "--label-column"),
    ],
)
def test_what_is_ambiguous_is_asked_with_the_flag_to_use(columns, flag):
    message = refused(table(*columns))
    assert flag in message
    assert ", ".join(f"'{c}'" for c in columns) in message


def test_no_text_at_all():
    message = refused(table("x", "y", x="1", y="2"))
    assert "no column of text" in message


def test_a_first_line_of_data_is_recognised():
    message = refused(table("0", "a fine film", "x"))
    assert "looks like data" in message


def test_the_task_narrows_the_search():
    given = table("question", "answer", "label")
    found = find_columns(given, task="classification")
    assert found == Columns(text="question", pair="answer", label="label")
    found = find_columns(given, task="causal-lm")
    assert found == Columns(prompt="question", completion="answer", turns=True)
    found = find_columns(table("text", "label"), task="causal-lm")
    assert found == Columns(text="text")
    assert "no label column" in refused(table("text"), task="classification")


def test_answers_that_are_not_text_are_no_completions():
    given = table("question", "passage", "answer", answer=True)
    found = find_columns(given, ColumnNames(label="answer"))
    assert found == Columns(text="question", pair="passage", label="answer")


def test_labels_and_completions_may_be_absent_for_prediction():
    found = find_columns(table("text", "other"), task="classification", require_labels=False)
    assert found == Columns(text="text")
    assert find_columns(table("prompt"), require_labels=False) == Columns(prompt="prompt")
    found = find_columns(table("instruction", "input"), require_labels=False)
    assert found == Columns(prompt="instruction", turns=True, context="input")
    found = find_columns(table("ask"), ColumnNames(prompt="ask"), require_labels=False)
    assert found == Columns(prompt="ask")
