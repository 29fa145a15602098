"""Adapted layers: .weight tells the truth, keys, dtypes, copies, files, compiling, refusals."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise import Gaussian, LoRA, attach, detach
from rankwise.layers import (
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    Spec,
    refusal,
    shape_of,
    wrap,
)

SPEC = Spec(r=3, alpha=6.0)


def linear() -> nn.Module:
    return nn.Linear(5, 7)


def conv1d() -> nn.Module:
    return Conv1D(7, 5)  # (outputs, inputs)


def embedding() -> nn.Module:
    return nn.Embedding(5, 7)


KINDS = pytest.mark.parametrize("make", [linear, conv1d, embedding])


def probe(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(module, (nn.Embedding, LoRAEmbedding)):
        return torch.tensor([[0, 4, 2], [1, 1, 3]])
    return torch.randn(2, 3, 5, dtype=dtype)


def moved(layer: LoRALayer) -> LoRALayer:
    """The layer with an update that is not zero, as after training."""
    with torch.no_grad():
        layer.update.lora_A.normal_(std=0.5)
        layer.update.lora_B.normal_(std=0.5)
    return layer


# --- construction --------------------------------------------------------------------------------


@KINDS
def test_a_layer_holds_its_base_and_two_factors(make):
    base = make()
    layer = wrap(base, SPEC)
    assert layer.base_layer is base
    assert shape_of(base) == (7, 5)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters() if "lora" in n} == {
        "updates.default.lora_A": (3, 5),
        "updates.default.lora_B": (7, 3),
    }
    assert layer.update.scale == 2.0


@KINDS
def test_a_new_layer_is_its_base_bit_for_bit_and_its_weight_too(make):
    base = make()
    layer, x = wrap(base, SPEC), probe(base)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.weight, base.weight)


def test_one_factor_starts_random_and_the_other_zero():
    linear_layer, embedding_layer = wrap(linear(), SPEC), wrap(embedding(), SPEC)
    assert (linear_layer.update.lora_A != 0).all()
    assert not linear_layer.update.lora_B.any()
    assert (embedding_layer.update.lora_B != 0).all()
    assert not embedding_layer.update.lora_A.any()


def test_the_asked_start_is_drawn():
    torch.manual_seed(5)
    layer = wrap(nn.Linear(400, 7), Spec(50, 1.0, init=Gaussian()))
    assert layer.update.lora_A.std().item() == pytest.approx(1 / 50, rel=0.05)


@pytest.mark.parametrize(
    ("base", "factors"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@KINDS
def test_factors_are_float32_or_wider(make, base: torch.dtype, factors: torch.dtype):
    module = make().to(base)
    layer = moved(wrap(module, SPEC))
    y = layer(probe(module, base))
    assert (layer.update.lora_A.dtype, layer.update.lora_B.dtype) == (factors, factors)
    assert (y.dtype, layer.weight.dtype) == (base, base)


def test_a_layer_on_the_meta_device_takes_no_memory_and_has_its_shapes():
    with torch.device("meta"):
        layer = wrap(nn.Linear(10**6, 10**6), SPEC)
        lookup = wrap(nn.Embedding(10**6, 10**6), SPEC)
        y = layer(torch.empty(2, 10**6))
    assert all(p.is_meta for p in [*layer.parameters(), *lookup.parameters()])
    assert y.shape == (2, 10**6)
    assert layer.weight.shape == (10**6, 10**6)


@KINDS
def test_a_layer_takes_over_training_or_evaluating(make):
    assert wrap(make().eval(), SPEC).training is False
    assert wrap(make().train(), SPEC).training is True


def test_extra_repr_shows_every_number():
    text = repr(wrap(linear(), Spec(4, 6.0, rank_stabilized=True, dropout=0.1)))
    assert "r=4, alpha=6, scale=3 (alpha/sqrt(r)), dropout=0.1" in text


# --- the weight in force -------------------------------------------------------------------------


@KINDS
def test_weight_is_base_plus_delta_in_the_bases_orientation(make):
    base = make().double()
    layer = moved(wrap(base, SPEC))
    delta = 2.0 * layer.update.lora_B @ layer.update.lora_A
    expected = base.weight + (delta if make is linear else delta.T)
    torch.testing.assert_close(layer.weight, expected)


@KINDS
def test_a_plain_module_with_this_weight_computes_the_same(make):
    base = make().double()
    layer = moved(wrap(base, SPEC))
    x = probe(base, torch.float64)
    plain = copy.deepcopy(base)
    plain.weight = nn.Parameter(layer.weight.detach())
    torch.testing.assert_close(plain(x), layer(x))


@KINDS
def test_gradients_through_weight_are_those_through_forward(make):
    base = make().double()
    layer = moved(wrap(base, SPEC))
    x, v = probe(base, torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    (layer(x) * v).sum().backward()
    forward = [layer.update.lora_A.grad, layer.update.lora_B.grad]
    layer.zero_grad()
    rows = nn.functional.one_hot(x, 5).double() if make is embedding else x
    matrix = layer.weight.T if make is linear else layer.weight
    (rows @ matrix * v).sum().backward()
    for a, b in zip(forward, [layer.update.lora_A.grad, layer.update.lora_B.grad], strict=True):
        assert a is not None
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_weight_of_a_bfloat16_layer_is_rounded_once():
    layer = moved(wrap(linear().bfloat16(), SPEC))
    wide = (
        layer.base_layer.weight.double()
        + 2.0 * layer.update.lora_B.double() @ layer.update.lora_A.double()
    )
    assert (layer.weight.double() - wide).abs().max() <= (wide.abs() * 2**-8).max()
    assert torch.equal(layer.weight, wide.float().bfloat16())


def test_autocast_does_not_round_the_base_inside_weight():
    layer = wrap(linear(), SPEC)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, layer.base_layer.weight)


def test_the_bias_is_the_bases():
    base = linear()
    assert wrap(base, SPEC).bias is base.bias
    assert wrap(nn.Linear(5, 7, bias=False), SPEC).bias is None
    module = conv1d()
    assert wrap(module, SPEC).bias is module.bias


def test_sizes_are_the_bases():
    layer, lookup = wrap(linear(), SPEC), wrap(nn.Embedding(5, 7, padding_idx=2), SPEC)
    assert isinstance(layer, LoRALinear)
    assert (layer.in_features, layer.out_features) == (5, 7)
    assert isinstance(lookup, LoRAEmbedding)
    assert (lookup.num_embeddings, lookup.embedding_dim, lookup.padding_idx) == (5, 7, 2)


def test_the_padding_row_stays_as_it_is_through_training():
    base = nn.Embedding(6, 4, padding_idx=2)
    layer = wrap(base, SPEC)
    optimizer = torch.optim.AdamW([layer.update.lora_A, layer.update.lora_B], lr=0.1)
    ids = torch.tensor([[0, 2, 3], [2, 5, 1]])
    for _ in range(3):
        optimizer.zero_grad()
        (layer(ids) - 1).square().sum().backward()
        optimizer.step()
    changed = [bool(row.any()) for row in (layer.weight - base.weight).detach()]
    assert changed == [True, True, False, True, False, True]  # 4 did not occur


# --- dropout, training and evaluating ------------------------------------------------------------


def test_dropout_acts_in_training_and_not_in_evaluation():
    base = nn.Linear(64, 8)
    layer, x = moved(wrap(base, Spec(4, 8.0, dropout=0.5))), torch.randn(3, 64)
    plain = moved(wrap(base, Spec(4, 8.0)))
    plain.load_state_dict(layer.state_dict())
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), plain(x))


@KINDS
def test_train_and_eval_change_no_tensor_and_no_output(make):
    base = make()
    layer, x = moved(wrap(base, SPEC)), probe(base)
    before = {k: t.clone() for k, t in layer.state_dict().items()}
    trained = layer.train()(x)
    evaluated = layer.eval()(x)
    layer.train()
    assert torch.equal(trained, evaluated)
    assert all(torch.equal(t, before[k]) for k, t in layer.state_dict().items())


# --- the tree, copies and files ------------------------------------------------------------------


class Block(nn.Module):
    """A small model with every kind of layer, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.mix = Conv1D(6, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=i == 0) for i in range(2))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.tokens(ids))
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(self.norm(x))


IDS = torch.tensor([[1, 2, 3], [4, 0, 10]])


def attached() -> Block:
    model = Block()
    attach(model, LoRA(r=2, target_modules=["tokens", "mix", "layers.1"], head="train"))
    for module in model.modules():
        if isinstance(module, LoRALayer):
            moved(module)
    return model


def test_the_whole_tree_of_an_attached_model():
    shapes = {name: tuple(tensor.shape) for name, tensor in attached().state_dict().items()}
    assert shapes == {
        "tokens.updates.default.lora_A": (2, 11),
        "tokens.updates.default.lora_B": (6, 2),
        "tokens.base_layer.weight": (11, 6),
        "mix.updates.default.lora_A": (2, 6),
        "mix.updates.default.lora_B": (6, 2),
        "mix.base_layer.weight": (6, 6),
        "mix.base_layer.bias": (6,),
        "layers.0.weight": (6, 6),
        "layers.0.bias": (6,),
        "layers.1.updates.default.lora_A": (2, 6),
        "layers.1.updates.default.lora_B": (6, 2),
        "layers.1.base_layer.weight": (6, 6),
        "norm.weight": (6,),
        "norm.bias": (6,),
        "head.weight": (2, 6),
        "head.bias": (2,),
    }


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_state_dict(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = attached()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, through_pickle, through_torch, through_state_dict]
)
def test_an_attached_model_survives_being_copied(copied):
    model = attached()
    twin = copied(model)
    assert torch.equal(twin(IDS), model(IDS))
    assert not set(map(id, twin.parameters())) & set(map(id, model.parameters()))
    with torch.no_grad():
        twin.mix.update.lora_A.zero_()
        assert not torch.equal(twin(IDS), model(IDS))
    detach(twin)  # the copy carries the record of what was attached
    assert list(twin.state_dict()) == list(Block().state_dict())
    assert isinstance(model.mix, LoRALinear)


def test_an_attached_model_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model, plain = attached(), attached()
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = plain(IDS), compiled(IDS)
    torch.testing.assert_close(found, expected)
    expected.sum().backward()
    found.sum().backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    assert len(gradients) == 8
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.get(name))


# --- refusals ------------------------------------------------------------------------------------


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A subclass that only has another name."""


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return super().forward(input + 1)


def whole_numbers() -> nn.Module:
    module = nn.Linear(3, 3).requires_grad_(False)
    module.weight.data = module.weight.data.to(torch.int8)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Doubling(3, 3), "Doubling is a Linear with a forward of its own"),
        (Shifted(3, 3), "Shifted is an Embedding with a forward of its own"),
        (nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
        (whole_numbers(), "torch.int8, not a floating-point"),
        (nn.LazyLinear(3), "has no shape yet"),
        (nn.LayerNorm(3), "LayerNorm is not one of"),
        (nn.ConvTranspose1d(3, 3, 1), "ConvTranspose1d is not one of"),
        (nn.LSTM(3, 3), "LSTM is not one of"),
        (nn.MultiheadAttention(4, 2), "adapted by its single weights: name q_proj"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(module: nn.Module, reason: str):
    assert reason in str(refusal(module))


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(3, 3),
        Named(3, 3),
        nn.Embedding(3, 3),
        Conv1D(3, 3),
        nn.MultiheadAttention(4, 2).out_proj,
    ],
)
def test_what_can_be_adapted_is_not_refused(module: nn.Module):
    assert refusal(module) is None
