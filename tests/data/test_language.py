"""What a language model is shown, and which tokens of it are learned."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.data.examples import Examples
from rankwise.data.language import IGNORED, open_prompts, sequences
from rankwise.errors import UserError

USER = {"role": "user", "content": "hello there"}
ANSWER = {"role": "assistant", "content": "good day to you"}
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<>\0"), min_size=1, max_size=15)


def texts(*rows: str) -> Examples:
    return Examples("causal-lm", "d.txt", list(range(1, len(rows) + 1)), texts=list(rows))


def prompts(*rows: tuple[str, str]) -> Examples:
    return Examples("causal-lm", "d.jsonl", list(range(1, len(rows) + 1)), prompts=list(rows))


def chats(*rows: list[dict[str, str]]) -> Examples:
    return Examples("causal-lm", "d.jsonl", list(range(1, len(rows) + 1)), messages=list(rows))


def learned(ids: list[int], labels: list[int], tokenizer) -> list[str]:
    """The runs of learned tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


# --- plain text ----------------------------------------------------------------------------------


def test_all_of_a_text_and_its_end_are_learned(gpt):
    made = sequences(texts("the cat", "two and two"), gpt)
    assert [gpt.decode(row) for row in made.ids] == ["the cat<end>", "two and two<end>"]
    assert made.labels == made.ids
    assert made.notes == ()


def test_an_end_token_that_the_tokenizer_adds_is_not_doubled(gpt):
    from tokenizers import processors

    end = gpt.eos_token_id
    gpt.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", end)]
    )
    for made in (sequences(texts("the cat"), gpt), sequences(prompts(("the", " cat")), gpt)):
        assert gpt.decode(made.ids[0]) == "the cat<end>"
    assert gpt.decode(open_prompts(texts("the cat"), gpt)[0]) == "the cat"


def test_a_tokenizer_without_an_end_token_says_so(make_gpt):
    made = sequences(texts("the cat"), make_gpt(eos=None))
    assert "no end token" in made.notes[0]


# --- prompt and completion -----------------------------------------------------------------------


def test_only_the_completion_and_the_end_are_learned(gpt):
    made = sequences(prompts(("what is two", " and two ?"), ("the", " cat")), gpt)
    runs = [learned(i, t, gpt) for i, t in zip(made.ids, made.labels, strict=True)]
    assert runs == [[" and two ?<end>"], [" cat<end>"]]
    assert gpt.decode(made.ids[0]) == "what is two and two ?<end>"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_the_prompt_s_tokens_are_those_of_generation_and_no_text_is_lost(gpt, rows):
    made = sequences(prompts(*rows), gpt)
    starts = open_prompts(prompts(*rows), gpt)
    for (prompt, completion), start, ids, labels in zip(
        rows, starts, made.ids, made.labels, strict=True
    ):
        assert start == gpt(prompt)["input_ids"]
        assert ids[: len(start)] == start
        assert labels == [IGNORED] * len(start) + ids[len(start) :]
        assert gpt.decode(ids[len(start) :]) == gpt.decode(gpt(completion)["input_ids"]) + "<end>"


def test_no_token_reaches_across_the_seam(gpt):
    # Joined, "the c" + "at" is read as "the" + " cat"; the prompt alone ends in " c".
    joined, alone = (gpt(t)["input_ids"] for t in ("the cat", "the c"))
    assert joined[: len(alone)] != alone
    made = sequences(prompts(("the c", "at")), gpt)
    assert made.ids[0][: len(alone)] == alone
    assert learned(made.ids[0], made.labels[0], gpt) == ["at<end>"]


def test_words_that_run_together_are_pointed_out(gpt):
    made = sequences(prompts(("two and two", "four"), ("two ", "four"), ("two:", "four")), gpt)
    assert "in 1 of 3 rows" in made.notes[0]
    assert "d.jsonl:1" in made.notes[0]


def test_prompts_with_a_chat_tokenizer_say_that_they_are_verbatim(chat):
    made = sequences(prompts(("two ", "four")), chat)
    assert "without the model's chat template" in made.notes[0]


# --- conversations -------------------------------------------------------------------------------


def test_the_chat_template_writes_and_the_answers_are_learned(chat):
    made = sequences(chats([USER, ANSWER, USER, ANSWER]), chat)
    turn = "<user>hello there<end>\n<assistant>good day to you<end>\n"
    assert chat.decode(made.ids[0]) == turn * 2
    assert learned(made.ids[0], made.labels[0], chat) == ["good day to you<end>\n"] * 2
    assert made.notes == ()


def test_system_messages_and_open_ends_are_not_learned(chat):
    system = {"role": "system", "content": "be kind"}
    made = sequences(chats([system, USER, ANSWER, USER]), chat)
    assert learned(made.ids[0], made.labels[0], chat) == ["good day to you<end>\n"]
    assert chat.decode(made.ids[0]).startswith("<system>be kind")


def test_without_a_template_a_plain_format_is_used_and_said(gpt):
    made = sequences(chats([USER, ANSWER, USER, ANSWER]), gpt)
    turn = "User: hello there\n\nAssistant: good day to you<end>"
    assert gpt.decode(made.ids[0]) == f"{turn}\n\n{turn}"
    assert learned(made.ids[0], made.labels[0], gpt) == [" good day to you<end>"] * 2
    assert "no chat template" in made.notes[0]


def test_a_conversation_that_starts_with_an_answer(gpt, chat):
    made = sequences(chats([ANSWER, USER, ANSWER]), gpt)
    assert len(learned(made.ids[0], made.labels[0], gpt)) == 2
    made = sequences(chats([ANSWER, USER, ANSWER]), chat)  # a template needs a message before it
    assert learned(made.ids[0], made.labels[0], chat) == ["good day to you<end>\n"]
    assert "1 of 2 answers are shown but not learned" in made.notes[0]


def test_a_template_that_rewrites_earlier_answers(make_gpt):
    # As reasoning models do: only the last answer keeps its thoughts.
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if loop.last and m['role'] == 'assistant' %}"
        "[thinking]{% endif %}{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    thinking = make_gpt(template=template)
    made = sequences(chats([USER, ANSWER, USER, ANSWER]), thinking)
    assert learned(made.ids[0], made.labels[0], thinking) == ["[thinking]good day to you<end>"]
    assert "1 of 2 answers are shown but not learned" in made.notes[0]


def test_a_template_that_refuses_names_every_row(make_gpt):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    strict = make_gpt(template=template)
    system = {"role": "system", "content": "be kind"}
    rows = chats([USER, ANSWER], [system, USER, ANSWER], [system, USER])
    for function in (sequences, open_prompts):
        with pytest.raises(UserError) as caught:
            function(rows, strict)
        assert "d.jsonl:2: no system role" in str(caught.value)
        assert "d.jsonl:3: no system role" in str(caught.value)
        assert "d.jsonl:1" not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.booleans())
def test_every_answer_is_learned_and_nothing_else(gpt, chat, rows, templated):
    tokenizer = chat if templated else gpt
    messages = [
        {"role": role, "content": text}
        for pair in rows
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    made = sequences(chats(messages), tokenizer)
    runs = learned(made.ids[0], made.labels[0], tokenizer)
    for run, (_, answer) in zip(runs, rows, strict=True):
        assert run.strip() == f"{answer}<end>".strip()


def test_generation_starts_where_the_last_answer_would(chat, gpt):
    whole = chats([USER, ANSWER, USER, ANSWER], [USER])
    first, second = (chat.decode(row) for row in open_prompts(whole, chat))
    assert second == "<user>hello there<end>\n<assistant>"
    assert first == "<user>hello there<end>\n<assistant>good day to you<end>\n" + second
    assert gpt.decode(open_prompts(whole, gpt)[1]) == "User: hello there\n\nAssistant:"
    made = sequences(whole, chat)
    start = open_prompts(whole, chat)[0]
    assert made.ids[0][: len(start)] == start
