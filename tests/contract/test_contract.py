"""Law 5: every method, on every kind of owner, passes the same checks."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import rankwise as rw
from rankwise.attaching import Method
from rankwise.layers import LoRALayer, shape_of
from rankwise.targets import find_head

VOCABULARY, WIDTH = 32, 16


class Encoder(nn.Module):
    """Embedding, nn.TransformerEncoder (fused in eval) and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.tokens(ids))
        query = self.query(x)
        return self.out(self.attention(query, x, x)[0].mean(1))


class Bert(nn.Module):
    """transformers' BERT for classification, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,  # of a trained model's size, so that attention attends
        )
        self.net = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids).logits


class Gpt2(nn.Module):
    """transformers' GPT-2, whose layers are Conv1D and whose output is tied, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=1,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.3,
        )
        self.net = GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids).logits


@dataclass(frozen=True)
class Case:
    """A model, a method for it, and the modules that the method declares, written out by hand."""

    build: Callable[[], nn.Module]
    method: Method
    adapted: dict[str, int]  # name → rank
    whole: tuple[str, ...] = ()
    everything: bool = False


def inside(model: nn.Module) -> nn.Module:
    """The model that methods are attached to: transformers' own where there is one."""
    return model.get_submodule("net") if isinstance(model, (Bert, Gpt2)) else model


ATTENTION = [
    f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")
]
DENSE = [
    f"bert.encoder.layer.{i}.{part}"
    for i in (0, 1)
    for part in ("attention.self.query", "attention.self.key", "attention.self.value")
] + [
    f"bert.encoder.layer.{i}.{part}.dense"
    for i in (0, 1)
    for part in ("attention.output", "intermediate", "output")
]  # fmt: skip
STACK = [
    f"encoder.layers.{i}.{part}"
    for i in (0, 1)
    for part in ("linear1", "linear2", "self_attn.out_proj")
]
CONV = [
    f"transformer.h.{i}.{part}"
    for i in (0, 1)
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]

CASES = {
    "lora on bert": Case(Bert, rw.LoRA(r=3), dict.fromkeys(ATTENTION, 3), ("classifier",)),
    "lora with a frozen head": Case(
        Bert, rw.LoRA(r=3, head="freeze"), dict.fromkeys(ATTENTION, 3)
    ),
    "rank-stabilised gaussian with patterns": Case(
        Bert,
        rw.LoRA(
            r=3, alpha=5, rank_stabilized=True, init=rw.Gaussian(), rank_pattern={"value": 1},
            alpha_pattern={"query": 2.0}, layers=[1],
        ),
        {ATTENTION[2]: 3, ATTENTION[3]: 1},
        ("classifier",),
    ),
    "lora on all linear layers": Case(
        Bert,
        rw.LoRA(r=2, target_modules="all-linear", exclude_modules=["pooler"]),
        dict.fromkeys(DENSE, 2),
        ("classifier",),
    ),
    "lora with further whole modules": Case(
        Bert,
        rw.LoRA(r=2, modules_to_save=["pooler", "embeddings.LayerNorm"]),
        dict.fromkeys(ATTENTION, 2),
        ("classifier", "bert.pooler", "bert.embeddings.LayerNorm"),
    ),
    "lora in torch's encoder and attention": Case(
        Encoder,
        rw.LoRA(r=2, target_modules=["linear1", "linear2", "out_proj", "tokens"], head="train"),
        dict.fromkeys([*STACK, "attention.out_proj", "tokens"], 2),
        ("out",),
    ),
    "lora on the output layer itself": Case(
        Encoder, rw.LoRA(r=2, target_modules=["query", "out"]), {"query": 2, "out": 2}
    ),
    "lora on conv1d and a tied embedding": Case(
        Gpt2,
        rw.LoRA(r=2, target_modules=["all-linear", "wte"]),
        dict.fromkeys([*CONV, "transformer.wte"], 2),
    ),
    "head only": Case(Encoder, rw.HeadOnly(), {}, ("out",)),
    "head only on bert": Case(Bert, rw.HeadOnly(), {}, ("classifier",)),
    "full": Case(Encoder, rw.Full(), {}, everything=True),
    "full on bert": Case(Bert, rw.Full(), {}, everything=True),
}  # fmt: skip

IDS = torch.randint(1, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(4))


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in model.state_dict().items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def declared(case: Case, plain: nn.Module) -> set[str]:
    """The names that may train, from what the case declares and the plain model."""
    if case.everything:
        return {n for n, _ in plain.named_parameters()}
    whole = {
        f"{name}.{key}"
        for name in case.whole
        for key, _ in plain.get_submodule(name).named_parameters()
    }
    return whole | {f"{name}.updates.default.lora_{half}" for name in case.adapted for half in "AB"}


def attached(case: Case) -> nn.Module:
    torch.manual_seed(9)
    model = case.build()
    rw.attach(inside(model), case.method)
    return model


def train(model: nn.Module, steps: int = 3) -> None:
    """A few steps of torch's SGD, large enough to show."""
    optimizer = torch.optim.SGD(list(trained(model).values()), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(IDS) - 1).square().mean().backward()
        optimizer.step()


# --- the checks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_step_0_the_outputs_are_the_bases_bit_for_bit(
    case: Case, dtype: torch.dtype, grad: bool, training: bool
):
    model = case.build().to(dtype).train(training)
    with torch.set_grad_enabled(grad):
        before = model(IDS)
        frozen = model.requires_grad_(False)(IDS)
        rw.attach(inside(model), case.method)
        after = model(IDS)
    assert after.dtype == dtype
    # With gradients on, torch's encoder layer takes its fused path when nothing in it trains, and
    # rounds otherwise there: frozen or not, it is the base's output.
    assert torch.equal(after, before) or torch.equal(after, frozen)
    if not grad or not isinstance(model, Encoder):
        assert torch.equal(before, frozen)


def test_exactly_the_declared_parameters_train(case: Case):
    plain = inside(case.build())
    sizes = {name: shape_of(plain.get_submodule(name)) for name in case.adapted}
    model = inside(attached(case))
    assert set(trained(model)) == declared(case, plain)
    by_formula = sum(r * sum(sizes[name]) for name, r in case.adapted.items())
    whole = plain.parameters() if case.everything else (
        p for name in case.whole for p in plain.get_submodule(name).parameters()
    )  # fmt: skip
    expected = by_formula + sum(p.numel() for p in whole)
    assert sum(p.numel() for p in trained(model).values()) == expected


def test_training_moves_every_declared_parameter_and_no_other_bit(case: Case):
    model = attached(case)
    names = set(trained(model))
    before = bits(model)
    train(model)
    moved = {k for k, t in bits(model).items() if not torch.equal(t, before[k])}
    tied = {"net.lm_head.weight"} & set(before) if case.everything else set()
    # the key's bias cancels in softmax; a gradient of rounding size may not move it
    still = {k for k in names if "key.bias" in k or k.endswith("in_proj_bias")}
    assert moved <= names | tied
    assert names - still <= moved


def test_attach_and_detach_give_back_the_same_modules_and_bits(case: Case):
    model = case.build()
    modules = {n: id(m) for n, m in model.named_modules(remove_duplicate=False)}
    parameters = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    before = bits(model)
    rw.attach(inside(model), case.method)
    if not case.everything:
        train(model)
    rw.detach(inside(model))
    assert {n: id(m) for n, m in model.named_modules(remove_duplicate=False)} == modules
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_what_was_trained_can_be_put_on_a_fresh_base(case: Case):
    model = attached(case)
    train(model)
    fresh = attached(case)
    assert not torch.allclose(fresh.eval()(IDS), model.eval()(IDS), atol=1e-4)
    if isinstance(case.method, rw.LoRA):
        adapter = rw.adapter_of(inside(model))
        rw.detach(inside(fresh))
        rw.attach(inside(fresh), adapter)
    else:
        fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(IDS), model.eval()(IDS))


def test_without_dropout_eval_equals_train_after_training(case: Case):
    model = attached(case)
    train(model)
    with torch.no_grad():
        training, evaluating = model.train()(IDS), model.eval()(IDS)
    torch.testing.assert_close(evaluating, training, rtol=1e-5, atol=1e-5)


def test_train_and_eval_change_no_bit(case: Case):
    model = attached(case)
    train(model, steps=1)
    before = bits(model)
    for mode in (False, True, False):
        model.train(mode)
        model(IDS)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_every_update_has_an_effect_in_evaluation(case: Case):
    """An adapter without effect is an error: each adapted layer, alone, changes the outputs."""
    model = attached(case).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}
    assert len(layers) == len(case.adapted)
    with torch.no_grad():
        base = model(IDS)
        for name, layer in layers.items():
            zero = layer.update.lora_A if not layer.update.lora_A.any() else layer.update.lora_B
            nn.init.normal_(zero, std=0.5)
            assert (model(IDS) - base).abs().max() > 1e-5, name
            zero.zero_()
            assert torch.equal(model(IDS), base), name


def test_the_head_is_found_again_on_the_attached_model(case: Case):
    plain, model = inside(case.build()), inside(attached(case))
    assert find_head(model) == find_head(plain)


def test_dropout_leaves_step_0_and_evaluation_alone():
    method = rw.LoRA(r=4, dropout=0.5)
    model = Bert().train()
    before = model(IDS)
    rw.attach(inside(model), method)
    assert torch.equal(model(IDS), before)  # the update is zero
    train(model)
    assert not torch.equal(model(IDS), model(IDS))
    model.eval()
    assert torch.equal(model(IDS), model(IDS))
