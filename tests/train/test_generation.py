"""Where a generated text ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankwise.train.generation import end_tokens

ENDED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<end>\n{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    """A byte tokenizer with one special token more, which the chat template closes a turn with."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(llama)
    made.add_special_tokens({"additional_special_tokens": ["<end>"]})
    made.chat_template = ENDED
    return made


def ending_with(own: int | list[int] | None) -> Any:
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))


def test_every_token_that_ends_a_text_is_named_once(tokenizer: Any) -> None:
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")
    assert eos != end
    assert end_tokens(ending_with(None), tokenizer, chat=False) == [eos]
    assert end_tokens(ending_with(7), tokenizer, chat=False) == sorted([7, eos])
    assert end_tokens(ending_with([7, eos, 3]), tokenizer, chat=False) == sorted([3, 7, eos])
    assert end_tokens(ending_with(eos), tokenizer, chat=True) == sorted([eos, end])


@pytest.mark.parametrize(
    "template",
    [
        ENDED.replace("<end>", " next"),  # letters, no special token
        ENDED.replace("<end>\n", ""),
        "{{ raise_exception('no system message') }}",
        None,
    ],
)
def test_a_template_without_a_closing_token_adds_none(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    assert end_tokens(ending_with(None), tokenizer, chat=True) == [tokenizer.eos_token_id]


def test_a_token_that_only_the_model_names_ends_the_text(llama: Path) -> None:
    """The list that predict passes on must not hide what the model's own folder says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    made = AutoTokenizer.from_pretrained(llama)
    ids = torch.tensor([made("good")["input_ids"]])
    mask = torch.ones_like(ids)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    third = int(free[0, ids.shape[1] + 2])
    model.generation_config.eos_token_id = third
    ends = end_tokens(model, made, chat=True)
    cut = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=ends
    )
    assert int(cut[0, -1]) == third
    assert cut.shape[1] <= ids.shape[1] + 3
