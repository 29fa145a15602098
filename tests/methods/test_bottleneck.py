"""Bottlenecks: the formula by hooks, where they stand, how many parameters, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.errors import UserError
from rankwise.layers import Activation, Network, Offset
from rankwise.methods.bottleneck import After, Bottleneck, Houlsby, Pfeiffer, output_projections
from rankwise.targets import matches, sites
from regimes import IDS, MASK, SMALL, WORDS, bert, bits, gpt2, llama, run, train


def made(build: Callable[[], nn.Module], seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return build().eval()


FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: lambda x: x.clamp_min(0),
    Activation.GELU: lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    Activation.SILU: lambda x: x / (1 + torch.exp(-x)),
    Activation.TANH: lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
}


# --- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(Activation))
def test_every_activation_is_its_function(activation: Activation):
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(activation(x), FUNCTIONS[activation](x))


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (bert, Bottleneck(5)),
        (bert, Bottleneck(4, Pfeiffer(norms=True), Activation.SILU)),
        (gpt2, Bottleneck(3, Pfeiffer(), Activation.RELU)),
        (llama, Bottleneck(3, activation=Activation.TANH)),
    ],
)
def test_outputs_and_gradients_are_those_of_hooks_on_the_plain_model(
    build: Callable[[], nn.Module], method: Bottleneck
):
    model, plain = made(build).double(), made(build).double()
    rw.attach(model, method)
    train(model)
    tensors: dict[str, list[Tensor]] = {}
    for name, update in updates_of(model).items():
        if isinstance(update, Offset):  # a normalisation's weight or bias
            owner, _, parameter = name.rpartition(".")
            values = plain.get_submodule(owner).get_parameter(parameter)
            values.data += update.offset.detach()
            tensors[name] = [values]
            continue
        assert isinstance(update, Network)
        D, d, U, u = own = [p.detach().clone().requires_grad_() for p in update.parameters()]
        tensors[name] = own

        def hook(_m, _x, y: Tensor, D=D, d=d, U=U, u=u) -> Tensor:
            return y + FUNCTIONS[method.activation](y @ D.T + d) @ U.T + u

        plain.get_submodule(name).register_forward_hook(hook)
    for head, copy in rw.attachment(model).copies.items():
        plain.get_submodule(head).load_state_dict(copy.state_dict())
    found = model(input_ids=IDS, attention_mask=MASK).logits
    wanted = plain(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found, wanted)
    model.zero_grad()
    found.square().mean().backward()
    wanted.square().mean().backward()
    for name, update in updates_of(model).items():
        for mine, other in zip(update.parameters(), tensors[name], strict=True):
            torch.testing.assert_close(mine.grad, other.grad)


def test_a_network_reads_what_was_attached_before_it_and_not_what_comes_after():
    layer = made(lambda: nn.Sequential(nn.Linear(6, 4)))
    x = torch.randn(3, 6)
    target = {"target_modules": "0", "head": "freeze"}
    rw.attach(layer, rw.LoRA(r=2, **target), name="first")
    rw.attach(layer, Bottleneck(3, After("0"), head="freeze"), name="net")
    rw.attach(layer, rw.LoRA(r=2, **target), name="last")
    with torch.no_grad():
        for name in ("first", "net", "last"):
            for update in updates_of(layer, name).values():
                for parameter in update.parameters():
                    parameter.normal_()
    first, last = (updates_of(layer, name)["0"].factors() for name in ("first", "last"))  # type: ignore[attr-defined]
    net = updates_of(layer, "net")["0"]
    assert isinstance(net, Network)
    W, b = layer[0].base_layer.weight, layer[0].base_layer.bias
    y = x @ (W + first.delta()).T + b
    y = y + F.gelu(y @ net.down.T + net.down_bias) @ net.up.T + net.up_bias
    torch.testing.assert_close(layer(x), y + x @ last.delta().T)
    torch.testing.assert_close(layer[0].weight, W + first.delta() + last.delta())


def test_under_autocast_and_on_a_short_base_the_outputs_keep_their_dtype():
    model = made(bert)
    rw.attach(model, Bottleneck(4))
    train(model)
    exact = run(model.eval())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(model), exact.bfloat16(), rtol=0.1, atol=0.1)


def test_down_starts_as_a_linear_layer_does_and_the_rest_at_zero():
    model = made(lambda: hf.BertModel(hf.BertConfig(**SMALL | {"hidden_size": 64})))
    rw.attach(model, Bottleneck(500))
    for update in updates_of(model).values():
        if isinstance(update, Network):
            assert update.down.abs().max() <= 1 / 8
            assert update.down.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
            assert not any(p.any() for p in (update.down_bias, update.up, update.up_bias))


# --- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "added"),
    [
        # Houlsby et al. 2019, section 2.1: 2 m d + d + m each, two in each of 12 layers, and the
        # 25 normalisations of BERT base
        (Bottleneck(64), 24 * (2 * 64 * 768 + 768 + 64) + 25 * 2 * 768),
        (Bottleneck(64, Pfeiffer()), 12 * (2 * 64 * 768 + 768 + 64)),
    ],
)
def test_the_numbers_of_bert_base(method: Bottleneck, added: int):
    with torch.device("meta"):
        model = hf.BertForSequenceClassification(hf.BertConfig())
    rw.attach(model, method)
    head = 2 * 768 + 2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == added + head


# --- where ---------------------------------------------------------------------------------------

EXPECTED = {
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "albert": ("attention.dense", "ffn_output"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "mpnet": ("attention.attn.o", "0.output.dense"),
    "deberta-v2": ("attention.output.dense", "0.output.dense"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_proj"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
    "wav2vec2": ("attention.out_proj", "feed_forward.output_dense"),
    "dinov2": ("attention.o_proj", "mlp.fc2"),
}
LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")


@pytest.mark.parametrize("kind", list(EXPECTED))
def test_the_output_projections_of_an_architecture(kind: str):
    config = hf.AutoConfig.for_model(kind)
    for name in LAYERS:
        if name in vars(config):
            setattr(config, name, 1)
    if kind == "gpt_neo":
        config.attention_layers = ["global"]
    if "layer_types" in vars(config) and config.layer_types:
        config.layer_types = config.layer_types[:1]
    with torch.device("meta"):
        model = hf.AutoModel.from_config(config)
    found = [
        [name for name in sites(model) if matches(pattern, name)]
        for pattern in output_projections(model)
    ]
    assert [len(names) for names in found] == [1, 1]
    for [name], end in zip(found, EXPECTED[kind], strict=True):
        assert name.endswith(f".{end}")


def test_the_output_projections_of_encoder_and_decoder():
    config = hf.T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = made(lambda: hf.T5ForConditionalGeneration(config))
    rw.attach(model, Bottleneck(2))
    networks = {n for n, u in updates_of(model).items() if isinstance(u, Network)}
    encoder, decoder = "encoder.block.0.layer", "decoder.block.0.layer"
    assert networks == {
        f"{encoder}.0.SelfAttention.o", f"{encoder}.1.DenseReluDense.wo",
        f"{decoder}.0.SelfAttention.o", f"{decoder}.1.EncDecAttention.o",
        f"{decoder}.2.DenseReluDense.wo",
    }  # fmt: skip
    y = model(input_ids=IDS, decoder_input_ids=IDS).logits
    for update in updates_of(model).values():
        if isinstance(update, Network):
            nn.init.normal_(update.up)
    assert (model(input_ids=IDS, decoder_input_ids=IDS).logits - y).abs().max() > 0.1


def test_houlsby_is_pfeiffer_and_one_behind_attention():
    both, one = made(bert), made(bert)
    rw.attach(both, Bottleneck(4, Houlsby(norms=False)))
    rw.attach(one, Bottleneck(4, Pfeiffer()))
    layers = [f"bert.encoder.layer.{i}" for i in (0, 1)]
    assert list(updates_of(one)) == [f"{layer}.output.dense" for layer in layers]
    assert set(updates_of(both)) == set(updates_of(one)) | {
        f"{layer}.attention.output.dense" for layer in layers
    }


def test_a_decoder_layer_of_torch_runs_its_second_linear():
    model = made(lambda: nn.Sequential(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0)))
    rw.attach(model, Bottleneck(3, After("linear2"), head="freeze"))
    [net] = updates_of(model).values()
    x = torch.randn(4, 2, 8)
    with torch.no_grad():
        before = model[0](x, x)
        net.up.normal_()
        assert (model[0](x, x) - before).abs().max() > 0.01


# --- what is refused -----------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16)
        self.fused = nn.Linear(8, 24)
        self.mix = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 3)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            Houlsby(),
            r"Own has no output .* end in: out_proj, linear1, linear2, fused, head\.",
        ),
        (After("words"), "'words' is no Linear layer"),
        (After("mix"), "'mix' is no Linear layer"),
        (After("attention.out_proj"), "'attention.out_proj' belongs to an nn.MultiheadAttention"),
        (After("linear2"), "'layer.linear2' belongs to an nn.TransformerEncoderLayer"),
        (After("attention.q_proj"), "'attention.q_proj' is no Linear layer as a whole"),
        (After("head"), "'head' is to be trained whole, and 'head' in it is to have a bottleneck"),
        (After("fusde"), r"'fusde' matches no module\. Did you mean 'fused'"),
        (After(["fused"], layers=[3]), "name no block that the targets occur in"),
    ],
)
def test_layers_behind_which_none_can_stand_are_refused_by_name(place: Any, message: str):
    model = Own()
    before = bits(model)
    with pytest.raises(UserError, match=message):
        rw.attach(model, Bottleneck(2, place, head="train"))
    assert list(bits(model)) == list(before)


def test_a_size_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="size must be a whole number of 1 or more, got 0"):
        Bottleneck(0)


def test_nothing_said_about_the_output_layer_is_an_error():
    with pytest.raises(UserError, match=r"Say Bottleneck\(\.\.\., head='train'\)"):
        rw.attach(Own(), Bottleneck(2, After("fused")))
