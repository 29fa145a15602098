"""merge, unmerge and merged: exact weights, exact round trips, plain models, honest refusals."""

import copy
import gc
import pickle
import weakref

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations

import rankwise
from rankwise.attaching import attached, kept_layers, lora_layers, trained_copies, updates_of
from rankwise.errors import UserError
from rankwise.merging import MergeError, fold, merge, merged, unmerge
from rankwise.targets import shared_weights

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


# --- the merged weight ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 20, fold.BLOCK])
def test_merged_weights_are_the_exact_sum_rounded_once(layers, dtype, block, monkeypatch):
    monkeypatch.setattr(fold, "BLOCK", block)
    model = layers(dtype)
    expected = {}
    for name, layer in lora_layers(model).items():
        delta = layer.update.scale * numbers(layer.update.lora_B) @ numbers(layer.update.lora_A)
        turned = delta.T if name in ("embed", "conv") else delta
        expected[name] = numbers(layer.base_layer.weight) + turned
    merge(model)
    half = torch.finfo(dtype).eps / 2
    for name, exact in expected.items():
        weight = model.get_submodule(name).weight
        assert weight.dtype == dtype
        off = np.abs(numbers(weight) - exact)
        # float32 sums before the rounding account for the second term
        allowed = half * np.abs(exact) + 2e-6 * (1 if dtype != torch.float64 else 1e-9)
        assert (off <= allowed).all()


def test_plain_layers_keep_class_settings_bias_and_order(layers):
    model = layers()
    before = {n: m.base_layer for n, m in lora_layers(model).items()}
    merge(model)
    for name, original in before.items():
        plain = model.get_submodule(name)
        assert type(plain) is type(original)
        assert plain is not original
        assert plain.weight is not original.weight
        assert repr(plain) == repr(original)
        assert list(plain.state_dict()) == list(original.state_dict())
        assert dict(plain.named_parameters()).get("bias") is dict(original.named_parameters()).get(
            "bias"
        )
    assert model.embed.padding_idx == 2
    assert type(model.attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"


def test_hooks_of_the_base_layer_are_kept_and_not_shared(layers, ids):
    model = layers()
    seen = []
    model.linear.base_layer.register_forward_hook(lambda *_: seen.append("old"))
    merge(model)
    model.linear.register_forward_hook(lambda *_: seen.append("new"))
    seen.clear()
    model(ids % 11)
    assert seen == ["old", "new"]
    unmerge(model)
    seen.clear()
    model(ids % 11)
    assert seen == ["old"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # in PEFT
def test_peft_merges_the_same_weights_to_the_same_numbers(trained, tiny):
    ours = tiny("bert").bert
    theirs = peft.get_peft_model(
        copy.deepcopy(ours),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=["query", "dense", "word_embeddings"]),
    )
    targets = ["query", "dense", "word_embeddings"]
    rankwise.attach(ours, rankwise.LoRA(r=4, alpha=12, target_modules=targets, head="freeze"))
    trained(ours, 0.2)
    for name, layer in lora_layers(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        looked_up = isinstance(layer.base_layer, nn.Embedding)
        pairs = (
            [
                (other.lora_embedding_A, layer.update.lora_A),
                (other.lora_embedding_B, layer.update.lora_B),
            ]
            if looked_up
            else [(other.lora_A, layer.update.lora_A), (other.lora_B, layer.update.lora_B)]
        )
        for there, here in pairs:
            tensor = there["default"] if looked_up else there["default"].weight
            tensor.data.copy_(here.data)
    merge(ours, keep=False)
    witness = theirs.merge_and_unload().state_dict()
    state = ours.state_dict()
    assert list(state) == list(witness)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, witness[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_encoder_layers_whose_fast_path_reads_the_weight_merge_right(trained, training):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    targets = ["linear1", "linear2", "out_proj"]
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=targets, head="freeze"))
    trained(model, 0.5)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        unmerged = model(x)
        certificate = merge(model, probe=x)
        torch.testing.assert_close(model(x), unmerged, rtol=1e-5, atol=1e-5)
    assert certificate.outputs.effect > 0.1
    assert model.training == training


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_round_trips_change_no_bit(net, ids, dtype):
    model = net(dtype, size=0.5)
    objects = {n: id(t) for n, t in [*model.named_modules(), *model.named_parameters()]}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = {n: p.requires_grad for n, p in model.named_parameters()}
    with torch.no_grad():
        before = model(ids)
        for _ in range(20):
            merge(model)
            assert not lora_layers(model)
            unmerge(model)
        assert torch.equal(model(ids), before)
    assert {n: id(t) for n, t in [*model.named_modules(), *model.named_parameters()]} == objects
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == gradients


def test_a_merged_model_has_the_keys_of_its_base(net):
    model = net()
    plain_keys = list(type(model)().state_dict())
    merge(model)
    assert list(model.state_dict()) == plain_keys
    assert not any(p.requires_grad for n, p in model.named_parameters() if "head" not in n)


def test_kept_layers_follow_device_and_mode(net):
    model = net()
    merge(model)
    kept = {n: m for n, (_, m) in kept_layers(model).items()}
    model.train()
    model.to("meta")
    unmerge(model)
    assert lora_layers(model) == kept
    assert all(p.is_meta for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_a_cast_or_replaced_plain_layer_is_not_overwritten(net):
    model = net()
    merge(model)
    model.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"cast from torch.float32 to torch.bfloat16"):
        unmerge(model)
    model.to(torch.float32)
    model.blocks[0].up = nn.Linear(16, 32)
    with pytest.raises(UserError, match=r"'blocks.0.up' is not the plain layer"):
        unmerge(model)


def test_the_block_unmerges_after_an_exception(net, ids):
    model = net()
    before = dict(model.named_modules())
    inside = []

    def fail() -> None:
        with merged(model, probe=ids) as certificate:
            inside.append((certificate.passed, len(lora_layers(model))))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert inside == [(True, 0)]
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_merged_model_is_whole_and_its_own(trained, tiny, ids, way):
    model = tiny("llama")
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules="all-linear"))
    trained(model)
    with torch.no_grad():
        unmerged = model(ids).logits
        merge(model)
        other = way(model)
        assert torch.equal(other(ids).logits, model(ids).logits)
        unmerge(other)
        assert torch.equal(other(ids).logits, unmerged)
        assert not lora_layers(model)
        unmerge(model)
        assert torch.equal(model(ids).logits, unmerged)
    mine, others = lora_layers(model), lora_layers(other)
    assert mine.keys() == others.keys()
    assert not any(mine[n].update.lora_A is others[n].update.lora_A for n in mine)


def test_a_module_that_hangs_in_two_places_is_merged_in_both(trained):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=["0"], head="freeze"))
    trained(model)
    x = torch.randn(3, 4)
    unmerged = model(x)
    certificate = merge(model, probe=x)
    assert model[0] is model[2]
    assert certificate.untied == ()
    torch.testing.assert_close(model(x), unmerged)
    unmerge(model)
    assert model[0] is model[2] is lora_layers(model)["0"]


# --- for good ------------------------------------------------------------------------------------


def test_without_keeping_nothing_of_rankwise_is_left(net, ids):
    model = net()
    names = list(type(model)().state_dict())
    head = trained_copies(model)["head"]
    with torch.no_grad():
        unmerged = model(ids)
    certificate = merge(model, keep=False, probe=ids)
    assert certificate.passed
    assert list(model.state_dict()) == names
    assert model.head is head
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(ids), unmerged)
    assert b"rankwise" not in pickle.dumps(model)
    rankwise.attach(model, rankwise.HeadOnly())  # nothing stands in the way of the next adapter


def test_without_keeping_each_old_weight_is_given_up_before_the_next_is_made(net, monkeypatch):
    model = net()
    old = [weakref.ref(layer.base_layer.weight) for layer in lora_layers(model).values()]
    alive = []
    honest = fold.plain

    def watched(*given):
        alive.append(sum(ref() is not None for ref in old))
        return honest(*given)

    monkeypatch.setattr(fold, "plain", watched)
    gc.disable()  # what is freed must be freed by the last reference, not by chance
    try:
        merge(model, keep=False)
        assert [ref() for ref in old] == [None] * len(old)
    finally:
        gc.enable()
    assert alive == list(range(len(old), 0, -1))


def test_without_keeping_a_failed_merge_leaves_the_model_as_it_was(net, ids, monkeypatch):
    model = net()
    before = dict(model.named_modules())
    with torch.no_grad():
        unmerged = model(ids)
    honest = fold.merged_weight
    monkeypatch.setattr(fold, "merged_weight", lambda *given: honest(*given) * 1.001)
    with pytest.raises(MergeError, match="FAILED") as caught:
        merge(model, keep=False, probe=ids)
    assert caught.value.exit_code == 3
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert dict(model.named_modules()) == before
    with torch.no_grad():
        assert torch.equal(model(ids), unmerged)
    monkeypatch.undo()
    merge(model, keep=False)


@pytest.mark.parametrize("method", [rankwise.HeadOnly(), rankwise.Full()])
def test_methods_without_low_rank_updates_have_nothing_to_merge(method, ids):
    model = nn.Sequential(nn.Embedding(40, 4), nn.Flatten(), nn.Linear(28, 3))
    rankwise.attach(model, method)
    trained = model[2]
    with merged(model, probe=ids) as certificate:
        assert certificate.passed
        assert certificate.layers == ()
        assert certificate.outputs.error == 0
        assert "nothing to add" in certificate.line()
        with pytest.raises(UserError, match="unmerge"):
            rankwise.detach(model)
    assert merge(model, keep=False).passed
    assert not attached(model)
    assert model[2] is trained


# --- tied weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("kind", "embedding"), [("llama", "model.embed_tokens"), ("gpt2", "transformer.wte")]
)
def test_a_tied_embedding_is_untied_and_the_output_layer_keeps_its_weight(
    trained, tiny, ids, kind, embedding, keep
):
    model = tiny(kind)
    original = model.lm_head.weight.clone()
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=[embedding]))
    trained(model, 0.5)
    with torch.no_grad():
        unmerged = model(ids).logits
        certificate = merge(model, keep=keep, probe={"input_ids": ids})
        torch.testing.assert_close(model(ids).logits, unmerged, rtol=1e-4, atol=1e-5)
    assert certificate.untied == (embedding, "lm_head")
    assert torch.equal(model.lm_head.weight, original)
    assert not torch.equal(model.get_input_embeddings().weight, original)
    assert shared_weights(model) == []
    if keep:
        unmerge(model)
        assert model.lm_head.weight is model.get_input_embeddings().base_layer.weight


def test_a_trained_copy_of_a_tied_output_layer_is_named_too(trained, tiny, ids):
    model = tiny("llama")
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=["q_proj"], head="train"))
    trained(model)
    certificate = merge(model, keep=False, probe=ids)
    assert certificate.untied == ("model.embed_tokens", "lm_head")


@pytest.mark.parametrize("keep", [True, False])
def test_a_shared_bias_that_parts_is_named(ids, keep):
    """The output layer of a masked language model shares its bias with the module around it."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.BertForMaskedLM(config).eval()
    around, output = model.cls.predictions, model.cls.predictions.decoder
    assert around.bias is output.bias
    method = rankwise.LoRA(r=2, target_modules=["decoder"], bias="adapted", tied=True)
    rankwise.attach(model, method)
    with torch.no_grad():
        for update in updates_of(model).values():
            for parameter in update.trained():
                parameter.normal_()
    certificate = merge(model, keep=keep, probe=ids)
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    assert not torch.equal(model.cls.predictions.decoder.bias, around.bias)
    assert certificate.untied == ("cls.predictions", "cls.predictions.decoder")


# --- refusals ------------------------------------------------------------------------------------


def test_verbs_in_the_wrong_order_are_refused_with_the_remedy(net):
    model = net()
    with pytest.raises(UserError, match=r"not merged.*merge\(model\)"):
        unmerge(model)
    merge(model)
    for wrong in (merge, rankwise.detach, lambda m: merge(m, keep=False)):
        with pytest.raises(UserError, match=r"rankwise.unmerge\(model\)"):
            wrong(model)
    with pytest.raises(UserError, match=r"unmerge"), rankwise.base(model):
        pass
    unmerge(model)
    with pytest.raises(UserError, match="not merged"):
        unmerge(model)
    with pytest.raises(UserError, match=r"no adapter. Attach one"):
        merge(nn.Linear(2, 2))


def test_layers_that_cannot_be_rebuilt_are_named_together(trained):
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4)
    )
    rankwise.attach(model, rankwise.LoRA(r=1, target_modules=[r"[012]"]))
    inner = model[1].base_layer
    inner.forward = inner.forward
    with pytest.raises(UserError) as caught:
        merge(model)
    assert "'0' is computed from other tensors" in str(caught.value)
    assert "'1' was replaced" in str(caught.value)
    assert "'2'" not in str(caught.value)
