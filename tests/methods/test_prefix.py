"""Prefix tuning: PEFT and hand-written attention as witnesses, generation, and what is refused."""

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import rankwise as rw
from rankwise.attaching import attached, updates_of
from rankwise.errors import RankwiseError, UserError
from rankwise.layers import FreePrefix, GrownPrefix, Prefix
from rankwise.methods.prefix import PrefixTuning
from regimes import IDS, MASK, SMALL, WORDS, bert, gpt2, llama, train

LENGTH = 3
DECODERS = pytest.mark.parametrize("build", [gpt2, llama])
IMPLEMENTATIONS = pytest.mark.parametrize("attention", ["sdpa", "eager"])
T5: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
BART: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "init_std": 0.3,
    "dropout": 0.0,
}


def made(build: Any, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return build().eval()


def moved(model: nn.Module, size: float = 0.7, name: str | None = None) -> None:
    """A prefix as large as after training: of the size of the tokens' own keys and values."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for update in updates_of(model, name).values():
            for parameter in update.trained():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


# --- PEFT ----------------------------------------------------------------------------------------


def peft_twin(model: Any, prefixes: list[Prefix], hidden: int | None) -> Any:
    """PEFT's prefix tuning on a copy of the base, with the numbers of these prefixes."""
    from peft import PrefixTuningConfig, get_peft_model

    more = {} if hidden is None else {"prefix_projection": True, "encoder_hidden_size": hidden}
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        twin = get_peft_model(model, config)
    encoder = twin.prompt_encoder["default"]
    with torch.no_grad():
        if hidden is None:
            rows = [t.transpose(0, 1).flatten(1) for p in prefixes for t in p.pair()]
            encoder.embedding.weight.copy_(torch.cat(rows, 1))
            return twin
        grown = [p for p in prefixes if isinstance(p, GrownPrefix)]
        encoder.embedding.weight.copy_(grown[0].trunk.embedding)
        encoder.transform[0].load_state_dict(grown[0].trunk.inner.state_dict())
        encoder.transform[2].weight.copy_(torch.cat([p.outer.weight for p in grown]))
        encoder.transform[2].bias.copy_(torch.cat([p.outer.bias for p in grown]))
    return twin


@DECODERS
@IMPLEMENTATIONS
@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_and_gradients_are_those_of_peft(
    build: Any, attention: str, hidden: int | None, padded: bool
):
    model, plain = made(build), made(build)
    model.set_attn_implementation(attention)
    rw.attach(model, PrefixTuning(LENGTH, hidden))
    moved(model, 0.7 if hidden is None else 0.4)
    prefixes = [u for u in updates_of(model).values() if isinstance(u, Prefix)]
    twin = peft_twin(plain, prefixes, hidden)
    mask = MASK if padded else torch.ones_like(MASK)
    # PEFT's prefix lies in the cache, so that its tokens stand at positions behind it
    positions = torch.arange(IDS.shape[1])[None] + LENGTH
    mine = model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = twin(input_ids=IDS, attention_mask=mask).logits
    keep = mask.bool()
    torch.testing.assert_close(mine[keep], theirs[keep], rtol=1e-4, atol=1e-5)
    mine[keep].square().mean().backward()
    theirs[keep].square().mean().backward()
    encoder = twin.prompt_encoder["default"]
    if hidden is None:
        found = [p.grad.transpose(0, 1).flatten(1) for u in prefixes for p in u.parameters()]
        gradient = torch.cat(found, 1)
    else:
        assert isinstance(prefixes[0], GrownPrefix)
        gradient = prefixes[0].trunk.embedding.grad
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, encoder.embedding.weight.grad, rtol=1e-3, atol=1e-5)


# --- attention by hand ---------------------------------------------------------------------------

PAIRS: dict[int, tuple[Tensor, Tensor]] = {}


def by_hand(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(1 − λ) · attention(K, V) + λ · attention(P_k, P_v), in float64; docs/math.md (21)."""
    groups = query.shape[1] // key.shape[1]
    own_keys, own_values = PAIRS[id(module)]
    query, key, value = query.double(), key.double(), value.double()
    scale = options.get("scaling") or query.shape[-1] ** -0.5

    def scores(keys: Tensor) -> Tensor:
        return query @ keys.repeat_interleave(groups, -3).mT * scale

    among = scores(key)
    among = among if mask is None else among + mask
    if options.get("position_bias") is not None:
        among = among + options["position_bias"]
    before = scores(own_keys.double())
    share = torch.sigmoid(before.logsumexp(-1) - among.logsumexp(-1))[..., None]
    tokens = torch.softmax(among, -1) @ value.repeat_interleave(groups, -3)
    prefix = torch.softmax(before, -1) @ own_values.double().repeat_interleave(groups, -3)
    mixed = (1 - share) * tokens + share * prefix
    return mixed.transpose(1, 2).float(), None


AttentionInterface.register("by_hand", by_hand)
AttentionMaskInterface.register("by_hand", eager_mask)

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(9))
SMALL_IMAGE = {
    k: v for k, v in SMALL.items() if k not in ("vocab_size", "bos_token_id", "eos_token_id")
}
FAMILIES: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "bert": (bert, {"input_ids": IDS, "attention_mask": MASK}),
    "llama": (llama, {"input_ids": IDS, "attention_mask": MASK}),
    "gpt2 without a mask": (gpt2, {"input_ids": IDS}),
    "t5, with position biases and cross attention": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS.flip(0)},
    ),
    "bart, with other heads in its decoder": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
        {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS.flip(0)},
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**SMALL_IMAGE, image_size=8, patch_size=4, hidden_dropout_prob=0.0)
        ),
        {"pixel_values": IMAGES},
    ),
}  # fmt: skip


@IMPLEMENTATIONS
@pytest.mark.parametrize("family", list(FAMILIES))
def test_outputs_are_those_of_attention_by_hand(family: str, attention: str):
    build, inputs = FAMILIES[family]
    model, plain = made(build), made(build)
    model.set_attn_implementation(attention)
    before = model(**inputs).logits
    rw.attach(model, PrefixTuning(LENGTH))
    moved(model)
    updates = updates_of(model)
    layers = dict(plain.named_modules())
    PAIRS.update({id(layers[name]): u.pair() for name, u in updates.items()})  # type: ignore[attr-defined]
    plain.set_attn_implementation("by_hand")
    with torch.no_grad():
        mine, theirs = model(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert (mine - before).abs().max() > 0.05


@IMPLEMENTATIONS
@pytest.mark.parametrize("names", [("short", None, "grown"), ("grown", "lora", "short")])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_row_of_a_batch_sees_its_own(
    family: str, names: tuple[str | None, ...], attention: str
):
    build, inputs = FAMILIES[family]
    model = made(build)
    model.set_attn_implementation(attention)
    rw.attach(model, PrefixTuning(LENGTH), name="short")
    rw.attach(model, PrefixTuning(LENGTH + 2, hidden=4), name="grown")
    targets = {"t5": ["q", "wo"], "gpt2": ["c_attn"], "bert": ["query"], "vit": ["q_proj"]}
    kind = model.config.model_type
    method = rw.LoRA(r=2, target_modules=targets.get(kind, ["q_proj"]))
    rw.attach(model, method, name="lora")
    for name in ("short", "grown", "lora"):
        moved(model, name=name)
    with torch.no_grad():
        with rw.using_rows(model, names):
            found = model(**{k: v[:3] for k, v in inputs.items()}).logits
        for i, name in enumerate(names):
            with rw.using(model, *([] if name is None else [name])):
                alone = model(**{k: v[i : i + 1] for k, v in inputs.items()}).logits
            torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-4, atol=1e-5)


# --- using it ------------------------------------------------------------------------------------


@DECODERS
@IMPLEMENTATIONS
def test_generation_with_a_cache_is_that_without(build: Any, attention: str):
    model = made(build)
    model.set_attn_implementation(attention)
    rw.attach(model, PrefixTuning(LENGTH))
    moved(model)
    left = MASK.flip(1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": left}
    cached = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    rw.detach(model)
    assert not torch.equal(cached, model.generate(IDS, **options))


def test_inputs_may_be_as_long_as_without():
    model = made(lambda: hf.BertModel(hf.BertConfig(**SMALL, max_position_embeddings=6)))
    rw.attach(model, PrefixTuning(50))
    assert model(input_ids=IDS).last_hidden_state.shape == (4, 6, 16)


def test_checkpointed_activations_give_the_same_gradients():
    gradients: list[list[Tensor]] = []
    for checkpointing in (False, True):
        model = made(bert).train()
        torch.manual_seed(1)
        rw.attach(model, PrefixTuning(LENGTH))
        if checkpointing:
            model.activation_checkpointing_enable()
        model(input_ids=IDS).logits.square().mean().backward()
        gradients.append([p.grad for u in updates_of(model).values() for p in u.parameters()])  # type: ignore[misc]
    assert all(bool(g.any()) for g in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_attention_weights_tell_the_share_of_the_prefix_before_and_after_detaching():
    model = made(bert)
    model.set_attn_implementation("eager")
    rw.attach(model, PrefixTuning(LENGTH))
    weights = model(input_ids=IDS, output_attentions=True).attentions
    assert [w.shape for w in weights] == [(4, 2, 6, LENGTH + 6)] * 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, 2, 6))
    rw.detach(model)
    weights = model(input_ids=IDS, output_attentions=True).attentions
    assert [w.shape for w in weights] == [(4, 2, 6, 6)] * 2


def test_a_compiled_model_gives_the_same():
    model = made(llama)
    rw.attach(model, PrefixTuning(LENGTH))
    moved(model)
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        found = torch.compile(model, backend="eager", fullgraph=True)(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
def test_a_pickled_model_runs_in_another_process(tmp_path: Path):
    model = made(bert)
    rw.attach(model, PrefixTuning(LENGTH))
    torch.save((model, model(input_ids=IDS).logits.detach()), tmp_path / "model.pt")
    code = (
        "import torch, sys; model, y = torch.load(sys.argv[1], weights_only=False); "
        f"assert torch.equal(model(input_ids=torch.tensor({IDS.tolist()})).logits, y)"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pt")], check=True
    )


def test_the_starts_are_small_and_those_of_a_network_are_as_peft_draws_them():
    torch.manual_seed(0)
    model = made(lambda: hf.BertModel(hf.BertConfig(**SMALL | {"hidden_size": 64})))
    rw.attach(model, PrefixTuning(100))
    for update in updates_of(model).values():
        assert isinstance(update, FreePrefix)
        assert update.keys.std().item() == pytest.approx(0.02, rel=0.1)
        assert update.values.std().item() == pytest.approx(0.02, rel=0.1)
    rw.detach(model)
    rw.attach(model, PrefixTuning(100, hidden=50))
    [first, _] = updates_of(model).values()
    assert isinstance(first, GrownPrefix)
    assert first.trunk.embedding.std().item() == pytest.approx(1, rel=0.1)
    for linear, width in ((first.trunk.inner, 64), (first.outer, 50)):
        assert linear.weight.std().item() == pytest.approx(1 / math.sqrt(3 * width), rel=0.1)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{"length": 0}, {"hidden": 0}, {"length": 2.5, "hidden": 3}])
def test_values_that_make_no_sense_are_refused(values: dict[str, int]):
    with pytest.raises(
        UserError, match=f"{next(iter(values))} must be a whole number of 1 or more"
    ):
        PrefixTuning(**values)


def test_attention_of_another_make_is_refused_by_name():
    config = hf.DebertaV2Config(**SMALL, max_position_embeddings=16, type_vocab_size=0)
    for model in (hf.DebertaV2ForSequenceClassification(config), nn.TransformerEncoderLayer(16, 2)):
        with pytest.raises(
            UserError, match=f"{type(model).__name__} has no attention that a prefix"
        ):
            rw.attach(model, PrefixTuning())
        assert not attached(model)


@pytest.mark.parametrize("attention", ["flash_attention_2", "by_hand"])
def test_an_implementation_whose_mask_is_not_known_is_refused(attention: str):
    model = made(bert)
    model.config._attn_implementation = attention
    with pytest.raises(UserError, match=rf"'bert\.encoder\.layer\.0.*' \(2 such\).*'{attention}'"):
        rw.attach(model, PrefixTuning())
    model.set_attn_implementation("sdpa")
    rw.attach(model, PrefixTuning())
    model.set_attn_implementation("by_hand")
    with pytest.raises(UserError, match=r"set_attn_implementation\('sdpa'\)"):
        model(input_ids=IDS)


def test_heads_that_are_not_what_the_module_says_are_refused_when_it_runs():
    model = made(bert)
    model.bert.encoder.layer[1].attention.self.attention_head_size = 4
    rw.attach(model, PrefixTuning())
    with pytest.raises(RankwiseError, match="2 heads of size 4, and its attention has 4 of size 4"):
        model(input_ids=IDS)


def test_it_learns_what_the_base_does_not_know():
    model = made(bert)
    rw.attach(model, PrefixTuning(LENGTH, head="freeze"))
    before = (model(input_ids=IDS).logits - 1).square().mean()
    train(model, 30)
    after = (model(input_ids=IDS).logits - 1).square().mean()
    assert after < before / 2
