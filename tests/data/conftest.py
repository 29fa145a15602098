"""Small tokenizers made on the spot: nothing is downloaded."""

from collections.abc import Callable

import pytest

SENTENCES = [
    "the cat sat on the mat and the dog sat on the cat",
    "what is two and two ? it is four",
    "User: hello there Assistant: good day to you",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level(eos: str | None = "<end>", template: str | None = None):
    """A byte-level BPE tokenizer like GPT-2's, which can write any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<user>", "<assistant>", "<end>"],
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def gpt():
    """Byte-level BPE with an end token and no chat template."""
    return byte_level()


@pytest.fixture
def chat():
    """The same with a chat template."""
    return byte_level(template=CHAT_TEMPLATE)


@pytest.fixture
def make_gpt() -> Callable:
    return byte_level


@pytest.fixture
def bert():
    """One id per word, [CLS] a [SEP] b [SEP], and token types, like BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
