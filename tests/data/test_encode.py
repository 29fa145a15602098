"""Token ids and targets: cutting, counting, and rows without anything to learn."""

import pytest

from rankwise.data.encode import encode, encode_prompts, padding_id
from rankwise.data.examples import Examples
from rankwise.errors import UserError


def classified(*texts: str, pairs: list[str] | None = None) -> Examples:
    n = len(texts)
    labels = [i % 2 for i in range(n)]
    return Examples(
        *("classification", "d.tsv", list(range(2, n + 2)), list(texts), pairs),
        labels=labels,
        label_names=("0", "1"),
    )


def prompted(*prompts: tuple[str, str]) -> Examples:
    return Examples("causal-lm", "d.jsonl", list(range(1, len(prompts) + 1)), prompts=list(prompts))


def test_a_text_gets_its_special_tokens_and_its_label(bert):
    found = encode(classified("a b", "c"), bert, 8)
    assert found.input_ids == [[2, 4, 5, 3], [2, 6, 3]]
    assert found.token_type_ids == [[0, 0, 0, 0], [0, 0, 0]]
    assert (found.lengths, found.kept, found.labels) == ([4, 3], [0, 1], [0, 1])
    assert (found.truncated, found.notes, len(found)) == (0, (), 2)


def test_a_pair_has_two_token_types(bert):
    found = encode(classified("a b", pairs=["c"]), bert, 8)
    assert found.input_ids == [[2, 4, 5, 3, 6, 3]]
    assert found.token_type_ids == [[0, 0, 0, 0, 1, 1]]


def test_a_tokenizer_without_token_types_gives_none(gpt):
    assert encode(classified("the cat"), gpt, 8).token_type_ids is None


def test_long_rows_are_cut_and_counted(bert):
    found = encode(classified("a b c d", "a b c", "e", pairs=["a b", "a", "b"]), bert, 7)
    assert found.input_ids[0] == [2, 4, 5, 3, 4, 5, 3]
    assert found.lengths == [7, 7, 5]
    assert found.truncated == 1  # the second is exactly as long as it may be
    assert "1 of 3 rows are longer than 7 tokens (the longest has 9)" in found.notes[0]


def test_without_labels_there_are_none(bert):
    unlabelled = Examples("classification", "d.tsv", [2], ["a"], label_names=("0", "1"))
    assert encode(unlabelled, bert, 8).labels is None


def test_quantities_stay_as_they_are(bert):
    rated = Examples("regression", "d.tsv", [2], ["a"], labels=[3.5])
    assert encode(rated, bert, 8).labels == [3.5]


def test_no_rows_give_no_entries(bert, gpt):
    assert len(encode(classified(), bert, 8)) == 0
    assert len(encode(prompted(), gpt, 8)) == 0


def test_a_limit_with_no_room_for_text_is_refused(bert):
    with pytest.raises(UserError, match=r"adds 2 special tokens .* Use 3 or more"):
        encode(classified("a"), bert, 2)
    with pytest.raises(UserError, match="Use 4 or more"):
        encode(classified("a", pairs=["b"]), bert, 3)
    with pytest.raises(UserError, match="max_length must be 1 or more"):
        encode_prompts(prompted(("a", "b")), bert, 0)


def test_rows_without_any_token_are_refused(make_gpt):
    bare = make_gpt()
    bare.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("x", "")
    with pytest.raises(UserError, match=r"no token at all of these rows: d\.tsv:3"):
        encode(classified("the", "xx"), bare, 8)


def test_conversations_cannot_be_classified(gpt):
    chat = Examples("classification", "d.jsonl", [1], messages=[[]], labels=[0])
    with pytest.raises(UserError, match="form 'messages'"):
        encode(chat, gpt, 8)


def test_a_warning_about_the_model_s_limit_is_left_to_the_caller(make_gpt, caplog):
    small = make_gpt()
    small.model_max_length = 4
    found = encode(prompted(("the cat sat on the mat", " and the dog")), small, 64)
    assert found.lengths[0] > 4
    assert caplog.records == []


# --- language models -----------------------------------------------------------------------------


def test_the_end_token_is_cut_off_with_the_end(gpt):
    text = Examples("causal-lm", "a.txt", [1], texts=["the cat sat on the mat"])
    whole = encode(text, gpt, 64)
    cut = encode(text, gpt, 3)
    assert whole.input_ids[0][-1] == gpt.eos_token_id
    assert cut.input_ids == [whole.input_ids[0][:3]]
    assert cut.labels == cut.input_ids
    assert (cut.truncated, cut.lengths) == (1, [3])


def test_rows_with_every_label_masked_are_left_out_with_a_note(gpt):
    rows = prompted(("the cat", " sat"), ("the cat sat on the mat " * 5, " yes"), ("two", " four"))
    found = encode(rows, gpt, 12)
    assert found.kept == [0, 2]
    assert len(found.input_ids) == len(found.labels) == len(found.lengths) == 2
    assert found.truncated == 1
    assert any("1 of 3 rows have no token to learn" in n and "d.jsonl:2" in n for n in found.notes)


def test_all_labels_masked_everywhere_is_refused(gpt):
    rows = prompted(("the cat sat on the mat " * 5, " yes"), ("and the dog too " * 9, " no"))
    with pytest.raises(UserError, match=r"no row has a token to learn within max_length 8 \(first"):
        encode(rows, gpt, 8)


def test_the_first_token_is_never_a_target_so_one_token_is_nothing_to_learn(make_gpt):
    text = Examples("causal-lm", "a.txt", [1], texts=["e"])
    with pytest.raises(UserError, match="no row has a token to learn"):
        encode(text, make_gpt(eos=None), 8)
    assert len(encode(text, make_gpt(), 8)) == 1  # the end token can be learned


def test_prompts_for_generation_are_cut_at_the_beginning(gpt):
    rows = prompted(("the cat sat on the mat", " yes"), ("hello", ""))
    whole = gpt("the cat sat on the mat")["input_ids"]
    found = encode_prompts(rows, gpt, 3)
    assert found.input_ids[0] == whole[-3:]
    assert found.labels is None
    assert (found.kept, found.truncated, found.lengths[0]) == ([0, 1], 1, 3)


def test_the_id_to_pad_with(bert, gpt, make_gpt):
    assert padding_id(bert) == 0
    assert padding_id(gpt) == gpt.eos_token_id != 0
    assert padding_id(make_gpt(eos=None)) == 0
