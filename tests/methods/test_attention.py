"""Transformers' attention interface: where it is, its heads, and what a mask becomes."""

import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.errors import UserError
from rankwise.layers import LoRALayer
from rankwise.methods.attention import Prefixed, attend, attention_sites, heads_of, prefixed, unfit
from rankwise.methods.bitfit import BitFit
from rankwise.methods.prefix import PrefixTuning
from regimes import IDS, SMALL, bert, gpt2, llama

SEEN: dict[int, tuple[int, int]] = {}


def watching(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any):
    """An attention function that notes the shapes it is given."""
    SEEN[id(module)] = (key.shape[1], key.shape[3])
    assert value.shape == key.shape
    groups = query.shape[1] // key.shape[1]
    mixed = F.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), mask
    )
    return mixed.transpose(1, 2), None


AttentionInterface.register("watching", watching)
AttentionMaskInterface.register("watching", eager_mask)

TEXT = {**SMALL, "pad_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "bert": TEXT,
    "distilbert": {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
    "albert": {**TEXT, "embedding_size": 8},
    "electra": {**TEXT, "embedding_size": 8},
    "modernbert": {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "gpt2": TEXT,
    "gpt_bigcode": {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4},
    "gpt_neox": TEXT,
    "llama": {**TEXT, "num_key_value_heads": 1},
    "qwen3": {**TEXT, "num_key_value_heads": 1, "head_dim": 6},
    "phi": TEXT,
    "phi3": {**TEXT, "num_key_value_heads": 1},
    "mixtral": {**TEXT, "num_key_value_heads": 1, "num_local_experts": 2},
    "opt": {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16},
}


def text_model(kind: str) -> Any:
    torch.manual_seed(0)
    return hf.AutoModel.from_config(hf.AutoConfig.for_model(kind, **KINDS[kind])).eval()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_heads_are_those_that_the_keys_have(kind: str):
    model = text_model(kind)
    model.set_attn_implementation("watching")
    SEEN.clear()
    with torch.no_grad():
        model(input_ids=IDS)
    found = {id(site.base): heads_of(site.base) for site in attention_sites(model)}
    assert SEEN
    assert found == SEEN


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_can_be_put_before_it_and_taken_away(kind: str, attention: str):
    model = text_model(kind)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        before = model(input_ids=IDS).last_hidden_state
        rw.attach(model, PrefixTuning(3))
        after = model(input_ids=IDS).last_hidden_state
        assert (after - before).abs().max() > 1e-4
        rw.detach(model)
        assert torch.equal(model(input_ids=IDS).last_hidden_state, before)


def test_keys_and_values_of_two_sizes_are_not_served():
    config = hf.DeepseekV3Config(**TEXT, num_key_value_heads=2, kv_lora_rank=4, q_lora_rank=4)
    with torch.device("meta"):
        model = hf.DeepseekV3ForCausalLM(config)
    [site, _] = attention_sites(model)
    assert unfit(site) == "it does not say how many heads it has"
    with pytest.raises(UserError, match=r"layers\.0\.self_attn' \(2 such\): it does not say"):
        rw.attach(model, PrefixTuning())


# --- masks ---------------------------------------------------------------------------------------


def attended(mask: Tensor | None, how: str, rows: int, columns: int, **options: Any) -> Tensor:
    """Which keys each query sees, found from the values that come back; the prefix stands first."""
    model = llama()
    model.set_attn_implementation(how)
    rw.attach(model, PrefixTuning(2))
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, LoRALayer)
    prefix = updates_of(model)["model.layers.0.self_attn"]
    every = torch.eye(2 + columns)  # the value of each key tells which one it is
    size = prefix.keys.shape[-1]  # type: ignore[union-attr]
    with torch.no_grad():
        prefix.keys.zero_()  # type: ignore[operator]
        prefix.values[0] = F.pad(every[:2], (0, size - 2 - columns))  # type: ignore[index]
    zeros, values = torch.zeros(1, 1, columns, size), F.pad(every[2:], (0, size - 2 - columns))
    query = torch.zeros(1, 2, rows, size)
    mixed, _ = attend(layer, query, zeros, values[None, None], mask, scaling=1.0, **options)
    return mixed[0, :, 0, : 2 + columns] > 0


CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
PART = torch.tensor([[True, False, True, True], [False, True, True, False]])


@pytest.mark.parametrize(
    ("mask", "how", "rows", "options", "wanted"),
    [
        (None, "sdpa", 4, {}, CAUSAL),  # torch makes the mask by itself
        (None, "sdpa", 4, {"is_causal": False}, CAUSAL | True),
        (None, "sdpa", 1, {}, CAUSAL[:1] | True),  # one new token sees all before it
        (None, "sdpa", 2, {}, CAUSAL[:2]),  # an empty cache of a fixed size lies behind
        (None, "eager", 4, {}, CAUSAL | True),  # where no mask means none
        (PART[None, None], "sdpa", 2, {}, PART),
        (torch.zeros(1, 1, 2, 4).masked_fill(~PART, -1e9), "eager", 2, {}, PART),
        (torch.zeros(1, 1, 2, 4).masked_fill(~PART, -1e9), "sdpa", 2, {}, PART),
    ],
)
def test_every_query_sees_the_prefix_and_of_the_tokens_what_it_saw(
    mask: Tensor | None, how: str, rows: int, options: dict[str, Any], wanted: Tensor
):
    found = attended(mask, how, rows, 4, **options)
    assert found[:, :2].all()
    assert torch.equal(found[:, 2:], wanted)


def test_continuous_batching_is_refused():
    with pytest.raises(UserError, match="continuous batching"):
        attended(None, "sdpa", 4, 4, cache=object())


# --- the config ----------------------------------------------------------------------------------


def test_only_the_attention_with_a_prefix_has_another_config():
    model = bert()
    rw.attach(model, PrefixTuning())
    layers = [layer.attention.self for layer in model.bert.encoder.layer]
    assert all(isinstance(layer.config, Prefixed) for layer in layers)
    assert model.config._attn_implementation == "sdpa"
    assert model.bert.encoder.config is model.config
    rw.detach(model)
    assert all(layer.attention.self.config is model.config for layer in model.bert.encoder.layer)


def test_a_merged_attention_that_had_a_prefix_once_is_the_plain_one():
    model = bert()
    attention = model.bert.encoder.layer[0].attention.self
    attention.register_parameter("own_bias", nn.Parameter(torch.zeros(3)))
    before = model.eval()(input_ids=IDS).logits
    rw.attach(model, BitFit(head="freeze"), name="bias")
    rw.attach(model, PrefixTuning(2, head="freeze"), name="prefix")
    rw.detach(model, "prefix")
    rw.merge(model, keep=False)
    torch.testing.assert_close(model(input_ids=IDS).logits, before)


def test_a_config_keeps_everything_else_and_is_wrapped_once():
    config = gpt2().config
    view = prefixed(config)
    assert view._attn_implementation == "rankwise_prefix"
    assert (view.hidden_size, view.n_head) == (16, 2)
    assert prefixed(view) is view
    assert pickle.loads(pickle.dumps(view)).n_layer == 2
    with pytest.raises(AttributeError, match="no_such"):
        _ = view.no_such
