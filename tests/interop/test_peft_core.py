"""PEFT as a witness: the same weights give the same outputs and gradients; and where PEFT errs."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise.attaching import lora_layers
from rankwise.errors import UserError
from rankwise.layers import LoRALayer

peft = pytest.importorskip("peft")

R, ALPHA = 4, 10


class One(nn.Module):
    """A model with a single layer, so that attaching needs a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(48, 40),
    "linear without bias": lambda: nn.Linear(48, 40, bias=False),
    "embedding": lambda: nn.Embedding(48, 40),
    "conv1d": lambda: Conv1D(40, 48),
}


def inputs(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 48, (3, 7))
    return torch.randn(3, 7, 48, dtype=dtype, requires_grad=True)


def with_peft(model: nn.Module, autocast: bool = True, **config: Any) -> nn.Module:
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D: fan_in_fan_out is set, with a warning
        return peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(**options), autocast_adapter_dtype=autocast
        )


def halves(theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """PEFT's A (r, in) and B (out, r) by the name of their module."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" not in name:
            continue
        module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        found.setdefault(module, {})["A" if "A" in rest.split(".")[0] else "B"] = parameter
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Give both the same random factors, rounded to the narrower of the two dtypes."""
    pairs = halves(theirs)
    layers = lora_layers(ours)
    assert set(pairs) == set(layers)
    for name, layer in layers.items():
        for mine, other in zip(
            (layer.update.lora_A, layer.update.lora_B), pairs[name], strict=True
        ):
            assert mine.shape == other.shape
            with torch.no_grad():
                other.normal_(std=0.3)
                mine.copy_(other)


def outcome(model: nn.Module, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    x.grad = None
    y = model(x)
    (y.float() * v).sum().backward()
    return y.detach(), x.grad


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in Frobenius norms."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("stabilized", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_float32_outputs_and_all_gradients_are_those_of_peft(kind: str, stabilized: bool):
    base = One(LAYERS[kind]())
    theirs = with_peft(base, use_rslora=stabilized)
    ours = base
    rw.attach(
        ours,
        rw.LoRA(
            r=R, alpha=ALPHA, target_modules=["layer"], rank_stabilized=stabilized, head="freeze"
        ),
    )
    same_weights(ours, theirs)
    [layer] = lora_layers(ours).values()
    assert layer.update.scale == pytest.approx(ALPHA / (math.sqrt(R) if stabilized else R))
    x, v = inputs(layer.base_layer, torch.float32), torch.randn(3, 7, 40)
    (y, dx), (peft_y, peft_dx) = outcome(ours, x, v), outcome(theirs, x, v)
    [(peft_A, peft_B)] = halves(theirs).values()
    assert relative(y, peft_y) < 1e-6
    for mine, other in ((layer.update.lora_A, peft_A), (layer.update.lora_B, peft_B)):
        assert mine.grad is not None
        assert other.grad is not None
        assert relative(mine.grad, other.grad) < 1e-6
    assert (dx is None) == (kind == "embedding")
    if dx is not None:
        assert peft_dx is not None
        assert relative(dx, peft_dx) < 1e-6
    assert all(p.grad is None for p in layer.base_layer.parameters())


@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapter", "bfloat16 adapter"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_on_a_bfloat16_base_both_are_as_near_to_the_exact_result(kind: str, autocast: bool):
    """bfloat16 keeps 8 bits: rounding to it errs by at most 2^-9 of a number.

    Each of the results is rounded a few times on its way (A, B, the product of rank r, the output,
    and as often in backward), by ours and by PEFT in other places, so neither is the truth. Both
    are compared with float64, and four such roundings, 4 · 2^-9 = 0.8 %, bound the Frobenius error.
    """
    base = One(LAYERS[kind]()).bfloat16()
    theirs = with_peft(base, autocast=autocast)
    ours, exact = base, copy.deepcopy(base).double()
    method = rw.LoRA(r=R, alpha=ALPHA, target_modules=["layer"], head="freeze")
    rw.attach(ours, method)
    rw.attach(exact, method)
    same_weights(ours, theirs)
    [layer], [truth] = lora_layers(ours).values(), lora_layers(exact).values()
    with torch.no_grad():
        truth.update.lora_A.copy_(layer.update.lora_A)
        truth.update.lora_B.copy_(layer.update.lora_B)
    [(peft_A, peft_B)] = halves(theirs).values()
    assert layer.update.lora_A.dtype == torch.float32
    assert peft_A.dtype == (torch.float32 if autocast else torch.bfloat16)
    x, v = inputs(layer.base_layer, torch.bfloat16), torch.randn(3, 7, 40).bfloat16().float()
    wide = x if x.dtype == torch.int64 else x.detach().double().requires_grad_()
    y, dx = outcome(ours, x, v)
    peft_y, peft_dx = outcome(theirs, x, v)
    true_y, true_dx = outcome(exact, wide, v)
    bound = 4 * 2**-9
    assert y.dtype == peft_y.dtype == torch.bfloat16
    compared = [
        (y, peft_y, true_y),
        (layer.update.lora_A.grad, peft_A.grad, truth.update.lora_A.grad),
        (layer.update.lora_B.grad, peft_B.grad, truth.update.lora_B.grad),
    ]
    if kind != "embedding":
        compared.append((dx, peft_dx, true_dx))
    for mine, other, true in compared:
        assert mine is not None
        assert other is not None
        assert true is not None
        assert relative(mine, true) < bound
        assert relative(other, true) < bound
        assert relative(mine, other) < 2 * bound


class Two(nn.Module):
    """A model with names for patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block.get_submodule("value")(block.get_submodule("query")(x)))
        return x


@pytest.mark.parametrize("stabilized", [False, True])
def test_rank_and_alpha_patterns_are_those_of_peft(stabilized: bool):
    base = Two()
    options: dict[str, Any] = {"rank_pattern": {"value": 2}, "alpha_pattern": {"blocks.1.query": 5}}
    theirs = with_peft(base, target_modules=["query", "value"], use_rslora=stabilized, **options)
    method = rw.LoRA(
        r=R, alpha=ALPHA, target_modules=["query", "value"], rank_stabilized=stabilized, **options
    )
    rw.attach(base, method)
    same_weights(base, theirs)
    assert {n: layer.update.lora_A.shape[0] for n, layer in lora_layers(base).items()} == {
        "blocks.0.query": 4,
        "blocks.0.value": 2,
        "blocks.1.query": 4,
        "blocks.1.value": 2,
    }
    x = torch.randn(5, 8)
    assert relative(base(x), theirs(x)) < 1e-6


# --- where PEFT errs in silence ------------------------------------------------------------------


def test_a_typo_beside_a_right_name_raises_here_and_passes_there():
    base = Two()
    theirs = with_peft(base, target_modules=["query", "vlaue"])
    assert {n.rpartition(".")[2] for n in halves(theirs)} == {"query"}
    with pytest.raises(UserError, match=r"'vlaue' matches no module\. Did you mean 'value'"):
        rw.attach(base, rw.LoRA(target_modules=["query", "vlaue"]))


def effect(model: nn.Module, output: Callable[[], Tensor]) -> float:
    """How much the update changes an output: the largest difference from B = 0."""
    with torch.no_grad():
        whole = output()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        return (whole - output()).abs().max().item()


def adapted_twice(model: nn.Module, target: str) -> nn.Module:
    """Adapt ``model`` here and a copy of it by PEFT, with the same factors; return the copy."""
    theirs = with_peft(model, target_modules=[target])
    rw.attach(model, rw.LoRA(r=R, alpha=ALPHA, target_modules=[target], head="freeze"))
    same_weights(model, theirs)
    return theirs


@pytest.mark.parametrize("target", ["linear1", "linear2"])
def test_the_encoders_fast_path_keeps_the_update_here_and_loses_it_there(target: str):
    ours = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    theirs, x = adapted_twice(ours, target), torch.randn(2, 5, 16)
    ours.eval()
    theirs.eval()
    assert effect(theirs, lambda: theirs(x)) == 0.0
    assert effect(ours, lambda: ours(x)) > 0.05


@pytest.mark.parametrize("training", [True, False])
def test_attention_keeps_the_update_of_its_output_projection_here_and_loses_it_there(
    training: bool,
):
    ours = One(nn.MultiheadAttention(16, 2, batch_first=True))
    theirs, x = adapted_twice(ours, "out_proj").train(training), torch.randn(2, 5, 16)
    inner = theirs.get_submodule("base_model.model.layer")
    ours.train(training)
    assert effect(theirs, lambda: inner(x, x, x)[0]) == 0.0
    assert effect(ours, lambda: ours.layer(x, x, x)[0]) > 0.05


def test_the_output_projection_of_an_attention_gets_its_update_twice_there():
    """So the file of such an update is read doubled and written halved (io/peft_fused.py)."""
    ours = One(nn.MultiheadAttention(16, 2, batch_first=True)).eval()
    theirs = with_peft(ours, target_modules=["layer"]).eval()
    pairs = {name: (A.normal_(), B.normal_()) for name, (A, B) in no_grad(halves(theirs)).items()}
    x = torch.randn(2, 5, 16)
    inner = theirs.get_submodule("base_model.model.layer")
    found = inner(x, x, x, need_weights=False)[0]
    outcomes: dict[int, float] = {}
    for times in (1, 2):
        plain = copy.deepcopy(ours.layer)
        with torch.no_grad():
            (A, B), (out_A, out_B) = pairs["layer"], pairs["layer.base_layer.out_proj"]
            plain.in_proj_weight += ALPHA / R * B @ A
            plain.out_proj.weight += times * ALPHA / R * out_B @ out_A
        outcomes[times] = relative(plain(x, x, x, need_weights=False)[0], found)
    assert outcomes[2] < 1e-5
    assert outcomes[1] > 0.1


def no_grad(
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]],
) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (A.data, B.data) for name, (A, B) in pairs.items()}


class Shared(nn.Module):
    """Query, key and value on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({n: nn.Linear(64, 64) for n in ("query", "key", "value")})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts.values()])


def kept_for_backward(model: nn.Module, x: Tensor) -> float:
    """Bytes of distinct storages kept for backward that are no parameters, in units of x's."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (saved, storage.nbytes())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = model(x)
    assert y.requires_grad
    return sum(size for _, size in storages.values()) / x.nbytes


def test_one_bfloat16_input_of_three_layers_is_kept_once_here_and_many_times_there():
    base = Shared().bfloat16()
    x = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=True)
    targets = ["query", "key", "value"]
    theirs = kept_for_backward(with_peft(base, r=1, target_modules=targets), x)
    rw.attach(base, rw.LoRA(r=1, target_modules=targets, head="freeze"))
    ours = kept_for_backward(base, x)
    assert 1 <= ours < 1.06  # x, three columns of rank 1 (3/64), and A and B in bfloat16
    assert theirs > 6


def test_a_tied_embedding_is_named_here():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(6, 4)
            self.out = nn.Linear(4, 6, bias=False)
            self.out.weight = self.tokens.weight

    record = rw.attach(Tied(), rw.LoRA(r=2, target_modules=["tokens"], head="freeze"))
    assert "'tokens' shares its weight with out" in record.notes[0]


def test_the_start_of_an_embedding_and_of_a_linear_is_that_of_peft():
    for kind in ("linear", "embedding"):
        base = One(LAYERS[kind]())
        [(A, B)] = halves(with_peft(base)).values()
        rw.attach(base, rw.LoRA(r=R, target_modules=["layer"], head="freeze"))
        [layer] = [m for m in base.modules() if isinstance(m, LoRALayer)]
        assert (bool(A.any()), bool(B.any())) == (
            bool(layer.update.lora_A.any()),
            bool(layer.update.lora_B.any()),
        )
        drawn, expected = (layer.update.lora_A, A) if A.any() else (layer.update.lora_B, B)
        assert drawn.std().item() == pytest.approx(expected.std().item(), rel=0.25)
