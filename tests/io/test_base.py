"""The facts about a base that a file needs."""

from collections.abc import Sequence

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import rankwise as rw
from rankwise.io.base import base_of, input_embedding, name_of, tied_vocabulary
from rankwise.methods.adapter import Adapter, adapter_of

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = BertConfig(**SMALL, intermediate_size=8)
GPT2 = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
T5 = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)


def nothing(trained: Sequence[str] = ()) -> Adapter:
    return Adapter(rw.LoRA(), {}, modules=tuple(trained))


def test_names_are_those_of_the_plain_base(base, trained):
    adapted = trained(rw.LoRA(r=2, target_modules=["query", "embed"], head="train"))
    plain = [name for name, _ in base().named_modules() if name]
    found = base_of(adapted, adapter_of(adapted))
    assert list(found.names) == plain
    assert found.modules["embed"] is adapted.embed.base_layer
    assert list(found.targets) == ["embed", "blocks.0.query", "blocks.1.query"]
    assert (found.name, found.task_type) == (None, None)
    assert set(found.sketch.modules) == set(found.targets)
    assert (found.partners, found.shared, found.vocabulary) == ({}, frozenset(), ())


@pytest.mark.parametrize(
    ("model", "trained", "task"),
    [
        (BertForSequenceClassification(BERT), ["classifier"], "SEQ_CLS"),
        (BertForSequenceClassification(BERT), [], None),  # PEFT would miss the head in the file
        (BertForTokenClassification(BERT), ["classifier"], "TOKEN_CLS"),
        (BertForQuestionAnswering(BERT), ["qa_outputs"], "QUESTION_ANS"),
        (BertModel(BERT), [], None),
        (GPT2LMHeadModel(GPT2), [], "CAUSAL_LM"),
        (T5ForConditionalGeneration(T5), [], "SEQ_2_SEQ_LM"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else str(value),
)
def test_the_task_is_told_by_the_class(model, trained, task):
    assert base_of(model, nothing(trained)).task_type == task


def test_the_name_is_the_one_it_was_loaded_by(base):
    model = BertModel(BERT)
    assert name_of(model) is None
    model.config._name_or_path = "some/bert"
    assert name_of(model) == base_of(model, nothing()).name == "some/bert"
    assert base_of(model, nothing(), name="other").name == "other"
    assert name_of(base()) is None


def tied_gpt2(tie: bool = True) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tie
    )
    return GPT2LMHeadModel(config)


def test_what_is_tied_to_the_input_embedding_is_known(base):
    assert tied_vocabulary(tied_gpt2()) == ("transformer.wte", "lm_head")
    assert tied_vocabulary(tied_gpt2(tie=False)) == ()
    assert input_embedding(tied_gpt2()) == "transformer.wte"
    assert (input_embedding(base()), tied_vocabulary(base())) == (None, ())
    model = tied_gpt2()
    rw.attach(model, rw.LoRA(r=2, target_modules=["wte"], tied=True, head="freeze"))
    assert tied_vocabulary(model) == ("transformer.wte", "lm_head")
    found = base_of(model, adapter_of(model))
    assert [t.name for t in found.partners["transformer.wte"]] == ["lm_head"]


def test_a_trained_copy_does_not_stand_for_the_base(trained):
    model = trained()
    found = base_of(model, adapter_of(model))
    assert found.modules["head"] is rw.attachment(model).originals["head"]
    assert found.modules["head"] is not model.head
