"""BitFit: the biases of a plain model as the witness, how many they are, and what is refused."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.errors import UserError
from rankwise.methods.bitfit import BitFit
from regimes import IDS, MASK, SMALL, bert, gpt2, llama, run, train

HEADS = ("classifier.weight", "classifier.bias")


def made(build: Any, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return build().eval()


@pytest.mark.parametrize(("build", "heads"), [(bert, HEADS), (gpt2, ())])
def test_it_learns_what_a_plain_model_learns_of_which_only_the_biases_train(
    build: Any, heads: tuple[str, ...]
):
    model, plain = made(build), made(build)
    rw.attach(model, BitFit())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.endswith(".bias") or name in heads)
    train(model, 5)
    train(plain, 5)
    torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-5)
    before = dict(made(build).named_parameters())
    for name, update in updates_of(model).items():
        learned = plain.get_parameter(name) - before[name]
        torch.testing.assert_close(update.offset, learned, rtol=1e-3, atol=1e-5)  # type: ignore[attr-defined]
        if "key" not in name:  # the bias of the keys cancels in softmax
            assert learned.abs().max() > 1e-4


def test_the_numbers_of_bert_base():
    with torch.device("meta"):
        model = hf.BertForSequenceClassification(hf.BertConfig())
    rw.attach(model, BitFit())
    # query, key, value, attention's output and normalisation, feed-forward's two and normalisation,
    # in 12 layers; the embeddings' normalisation and the pooler. Table 1 of the paper: about 0.1 M.
    biases = 12 * (5 * 768 + 3072 + 2 * 768) + 2 * 768
    assert biases == 102_912
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == biases + 2 * 768 + 2


def test_packed_biases_of_torchs_attention_train_as_well():
    model = made(lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12), nn.Linear(8, 3)))
    rw.attach(model, BitFit(head="train"))
    sizes = {n: u.offset.numel() for n, u in updates_of(model).items()}  # type: ignore[attr-defined]
    assert sizes == {
        "0.self_attn.in_proj_bias": 24, "0.self_attn.out_proj.bias": 8, "0.linear1.bias": 12,
        "0.linear2.bias": 8, "0.norm1.bias": 8, "0.norm2.bias": 8,
    }  # fmt: skip


def test_a_bias_that_a_frozen_head_holds_as_well_stays():
    model = made(lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)))
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    rw.attach(model, BitFit())
    assert not [n for n in updates_of(model) if n.startswith("cls.predictions.bias")]
    assert "cls.predictions.transform.dense.bias" in updates_of(model)


def test_a_model_without_biases_is_refused():
    with pytest.raises(UserError, match="LlamaForCausalLM has no biases outside its output layer"):
        rw.attach(made(llama), BitFit())


def test_nothing_said_about_the_output_layer_is_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(UserError, match=r"Say BitFit\(\.\.\., head='train'\)"):
        rw.attach(model, BitFit())
    with pytest.raises(UserError, match=r"modules_to_save: 'pooller' matches no module"):
        rw.attach(made(bert), BitFit(modules_to_save=["pooller"]))


def test_biases_of_a_short_base_learn_steps_that_its_own_numbers_could_not_hold():
    model = made(bert).to(torch.bfloat16)
    rw.attach(model, BitFit(head="freeze"))
    offset: Tensor = updates_of(model)["bert.pooler.dense.bias"].offset  # type: ignore[attr-defined,assignment]
    optimizer = torch.optim.SGD([offset], lr=1e-6)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, attention_mask=MASK).logits.float().square().mean().backward()
        optimizer.step()
    assert 0 < offset.abs().max() < 1e-4
