"""The facts about a base that a file needs."""

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
from rankwise.io.base import base_of, name_of

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = BertConfig(**SMALL, intermediate_size=8)
GPT2 = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
T5 = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)


def test_names_are_those_of_the_plain_base(base, trained):
    adapted = trained(rw.LoRA(r=2, target_modules=["query", "embed"], head="train"))
    plain = [name for name, _ in base().named_modules() if name]
    found = base_of(adapted, ["embed"])
    assert list(found.names) == plain
    assert found.embeddings == {"embed"}
    assert found.transposed == set()
    assert (found.name, found.task_type) == (None, None)
    assert list(found.sketch.modules) == ["embed"]


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
    assert base_of(model, [], trained).task_type == task


def test_layers_of_gpt2_are_known_as_transposed():
    assert base_of(GPT2LMHeadModel(GPT2), []).transposed == {
        *("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"),
        *("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"),
    }


def test_the_name_is_the_one_it_was_loaded_by(base):
    model = BertModel(BERT)
    assert name_of(model) is None
    model.config._name_or_path = "some/bert"
    assert name_of(model) == base_of(model, []).name == "some/bert"
    assert base_of(model, [], name="other").name == "other"
    assert name_of(base()) is None
