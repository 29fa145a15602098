"""LoRA-GA against autograd's gradients, numpy's decomposition and PEFT's own directions."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import UserError
from rankwise.inits import LoRAGA, Place, Start
from rankwise.inits.loraga import model_loss
from rankwise.lowrank import Factors

PlaceOf = Callable[..., Place]
StateOf = Callable[[nn.Module], Callable[[], None]]
Batches = list[dict[str, Tensor]]
NAMES = ("embed", "q", "k", "v", "fused", "head")


def places(model: nn.Module, place_of: PlaceOf, names: Sequence[str] = NAMES) -> list[Place]:
    return [place_of(model.get_submodule(n), r=1 if n == "head" else 4, name=n) for n in names]


def gradients(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """∂L/∂W (out, in) of every layer by autograd, summed over the batches, in evaluation mode."""
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    twin.zero_grad()
    for batch in batches:
        twin(**batch)["loss"].backward()
    found: dict[str, Tensor] = {}
    for name in NAMES:
        layer = twin.get_submodule(name)
        grad = layer.get_parameter("weight").grad
        assert grad is not None
        found[name] = grad.T if isinstance(layer, nn.Embedding | Conv1D) else grad
    return found


def spans(start: Start, gradient: Tensor, gamma: float = 16.0) -> None:
    """A and B are c times the singular vectors that they should be, up to signs."""
    r = len(start.A)
    u, _, vh = np.linalg.svd(gradient.double().numpy())
    size = len(gradient) ** 0.25 / gamma**0.5
    cosines = np.abs((start.A.numpy() * vh[:r]).sum(1)) / size
    np.testing.assert_allclose(cosines, 1, atol=1e-3)
    cosines = np.abs((start.B.numpy() * u[:, r : 2 * r]).sum(0)) / size
    np.testing.assert_allclose(cosines, 1, atol=1e-3)


@pytest.mark.parametrize("iterations", [4, None])
@pytest.mark.parametrize("gamma", [16.0, 4])
def test_a_and_b_are_singular_vectors_of_the_gradient(
    net: nn.Module, batches: Batches, place_of: PlaceOf, iterations: int | None, gamma: float
):
    chosen = places(net, place_of)
    starts = LoRAGA(batches, gamma=gamma, iterations=iterations).fit(net, chosen)
    expected = gradients(net, batches)
    for place in chosen:
        start = starts[place.name]
        spans(start, expected[place.name], gamma)
        assert start.subtract
        made = Factors(start.A, start.B, 2.0, start.A.clone(), start.B.clone())
        assert not made.delta().any()
        assert not made.apply(torch.randn(5, place.in_features)).any()


def test_the_model_is_left_as_it_was(
    net: nn.Module, batches: Batches, place_of: PlaceOf, state_of: StateOf
):
    check = state_of(net)
    with torch.no_grad():  # whatever stands around it
        first = LoRAGA(batches).fit(net, places(net, place_of))
    check()
    torch.rand(5)
    second = LoRAGA(iter(batches)).fit(net, places(net, place_of))
    for name, start in first.items():
        assert torch.equal(start.A, second[name].A)
        assert torch.equal(start.B, second[name].B)
        assert not start.A.requires_grad


def test_it_is_left_as_it_was_after_an_error(
    net: nn.Module, batches: Batches, place_of: PlaceOf, state_of: StateOf
):
    check = state_of(net)

    def broken(model: nn.Module, batch: Any) -> Tensor:
        model(**batch)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        LoRAGA(batches, broken).fit(net, places(net, place_of))
    check()


@pytest.mark.parametrize("trains", [True, False])
def test_it_does_not_matter_what_trains(
    net: nn.Module, batches: Batches, place_of: PlaceOf, trains: bool
):
    expected = LoRAGA(batches).fit(net, places(net, place_of))
    found = LoRAGA(batches).fit(net.requires_grad_(trains), places(net, place_of))
    for name, start in expected.items():
        torch.testing.assert_close(found[name].A, start.A)
        torch.testing.assert_close(found[name].B, start.B)


# PEFT hooks layers whose inputs ask for no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_its_directions_are_pefts(net: nn.Module, batches: Batches, place_of: PlaceOf):
    # PEFT scales otherwise (see LoRAGA), so directions are compared, and its gradient by its own
    # training step, which runs in training mode: without dropout it is the same.
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    net.drop.p, net.norm = 0.0, nn.LayerNorm(16)
    net.zero_grad()  # PEFT takes what is there for its own
    names = ("q", "k", "v")
    config = peft.LoraConfig(
        r=4,
        target_modules=list(names),
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction="ArB2r"),
    )
    starts = LoRAGA(batches).fit(net, places(net, place_of, names))
    preprocess_loraga(net, config, lambda: [net(**b)["loss"].backward() for b in batches])  # type: ignore[arg-type,return-value]
    theirs: Any = peft.get_peft_model(net, config).base_model.model
    for name in names:
        layer = theirs.get_submodule(name)
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        cosine = torch.nn.functional.cosine_similarity
        assert cosine(starts[name].A, A, dim=1).abs().min() > 0.99
        assert cosine(starts[name].B, B, dim=0).abs().min() > 0.99


def test_the_first_step_follows_full_fine_tuning(
    net: nn.Module, batches: Batches, place_of: PlaceOf
):
    # One step of gradient descent moves s · B A by −η s² (G AᵀA + B Bᵀ G). Of rank 2r, it is the
    # best approximation of G, up to its size: no other start of r rows can be nearer.
    gradient = gradients(net, batches)["v"]
    start = LoRAGA(batches, iterations=None).fit(net, places(net, place_of, ("v",)))["v"]
    size = len(gradient) ** 0.5 / 16
    step = (gradient @ start.A.T @ start.A + start.B @ start.B.T @ gradient) / size
    tail = torch.linalg.svdvals(gradient)[8:]
    assert (gradient - step).norm().item() == pytest.approx(tail.norm().item(), rel=1e-4)


def test_parts_of_a_fused_projection_take_their_rows(
    net: nn.Module, batches: Batches, place_of: PlaceOf
):
    expected = gradients(net, batches)["fused"]
    rows = (slice(0, 12), tuple(range(23, 11, -1)))
    chosen = [place_of(net.fused, name=f"fused.{i}", rows=part) for i, part in enumerate(rows)]
    starts = LoRAGA(batches).fit(net, chosen)
    spans(starts["fused.0"], expected[:12])
    spans(starts["fused.1"], expected[12:].flip(0))


def test_a_convolution_and_a_layer_called_twice(place_of: PlaceOf):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.act = nn.ReLU(inplace=True)  # changes in place what the layer gave

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.act(self.conv(x)))

    model, x = Twice(), torch.randn(3, 8, 6, 6)
    start = LoRAGA([x], lambda m, b: m(b).square().mean()).fit(model, [place_of(model.conv)])
    model(x).square().mean().backward()
    assert model.conv.weight.grad is not None
    spans(start["layer"], model.conv.weight.grad.flatten(1))


def test_a_quantised_base_will_do(place_of: PlaceOf):
    # The witness is a plain model of the very numbers that the quantised weights stand for.
    bnb = pytest.importorskip("bitsandbytes")
    packed, plain = nn.Sequential(), nn.Sequential()
    for _ in range(2):
        layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
        layer.load_state_dict({"weight": torch.randn(64, 64) / 8})
        packed.append(layer.to("cpu"))
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.append(nn.Linear(64, 64, bias=False))
        plain[-1].weight.data = weight
    twins = [place_of(layer, name=str(i)) for i, layer in enumerate(plain)]
    chosen = [replace(twin, module=packed[i]) for i, twin in enumerate(twins)]
    x = torch.randn(90, 64)
    starts = LoRAGA([x], lambda m, b: m(b).tanh().square().mean()).fit(packed, chosen)
    plain(x).tanh().square().mean().backward()
    for name, layer in zip("01", plain, strict=True):
        assert layer.weight.grad is not None
        spans(starts[name], layer.weight.grad)


def test_gradients_are_found_through_checkpoints(place_of: PlaceOf):
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    x = torch.randn(20, 12)

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return checkpoint(m, batch, use_reentrant=False).square().mean()

    chosen = [place_of(model[0], name="0")]
    plain = LoRAGA([x], lambda m, b: m(b).square().mean()).fit(model, chosen)["0"]
    found = LoRAGA([x], loss).fit(model, chosen)["0"]
    torch.testing.assert_close((found.A, found.B), (plain.A, plain.B))


def test_what_cannot_be_started_is_named_at_once(
    net: nn.Module, batches: Batches, place_of: PlaceOf, bank_of: PlaceOf
):
    chosen = [
        bank_of(torch.zeros(2, 8, 8)),
        place_of(net.head, r=2, name="head"),
        place_of(nn.Bilinear(4, 5, 6), r=2, name="pair"),
    ]
    with pytest.raises(UserError, match="LoRA-GA cannot start") as caught:
        LoRAGA(batches).fit(net, chosen)
    said = str(caught.value)
    assert "'experts.gate_up_proj': it is one of a bank" in said
    assert "'head': it takes 2r directions of a gradient of 3 by 16, so r may be 1" in said
    assert "'pair': Bilinear reads its weights itself" in said


def test_losses_that_tell_nothing_are_refused(net: nn.Module, batches: Batches, place_of: PlaceOf):
    q = places(net, place_of, ("q",))
    with pytest.raises(UserError, match="LoRA-GA was given no batches"):
        LoRAGA([]).fit(net, q)
    unlabelled = [{"input_ids": batches[0]["input_ids"]}]
    with pytest.raises(UserError, match="needs a loss, and Net gave none for this batch"):
        LoRAGA(unlabelled).fit(net, q)
    with pytest.raises(UserError, match=r"loss of batch 0 must be one number, got \(12, 3\)"):
        LoRAGA(batches, lambda m, b: m(**b)["logits"]).fit(net, q)
    with pytest.raises(UserError, match=r"loss of batch 0 must be one number, got float"):
        LoRAGA(batches, lambda m, b: 1.0).fit(net, q)  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="loss of batch 0 is inf"):
        LoRAGA(batches, lambda m, b: m(**b)["loss"] / 0).fit(net, q)


def test_layers_that_the_loss_does_not_see_are_refused(
    net: nn.Module, batches: Batches, place_of: PlaceOf
):
    q = places(net, place_of, ("q",))
    with pytest.raises(UserError, match="the loss does not change with 'q'"):
        LoRAGA(batches, lambda m, b: m(**b)["loss"].detach()).fit(net, q)
    with pytest.raises(UserError, match="the loss does not change with 'q'"):
        LoRAGA(batches, lambda m, b: m(**b)["loss"] * 0).fit(net, q)
    with pytest.raises(UserError, match="LoRA-GA never saw an input of 'q'"):
        LoRAGA([torch.ones(3, 2)], lambda m, b: m(b).sum()).fit(nn.Linear(2, 2), q)
    with pytest.raises(UserError, match="the gradient of 'q' is not finite"):
        LoRAGA([torch.ones(2, 16)], lambda m, b: (m.q(b) * 0).sum().sqrt()).fit(net, q)


def test_a_model_of_transformers_gives_its_loss(place_of: PlaceOf, state_of: StateOf):
    from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    model = GPT2LMHeadModel(config).requires_grad_(False)
    ids = torch.randint(0, 40, (6, 8))
    batch = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    blocks = [f"transformer.h.{i}.{n}" for i in range(2) for n in ("attn.c_attn", "mlp.c_proj")]
    chosen = places(model, place_of, blocks)
    check = state_of(model)
    starts = LoRAGA([batch], iterations=None).fit(model, chosen)
    check()
    model.eval().requires_grad_(True)(**batch).loss.backward()
    for name in blocks:
        grad = model.get_parameter(f"{name}.weight").grad
        assert grad is not None
        spans(starts[name], grad.T)


def test_the_loss_of_a_model_is_found_in_its_output():
    from types import SimpleNamespace

    class Says(nn.Module):
        def forward(self, output: Any) -> Any:
            return output

    one = torch.ones(())
    for output in ({"loss": one}, SimpleNamespace(loss=one)):
        assert model_loss(Says(), {"output": output}) is one
    with pytest.raises(UserError, match="LoRA-GA needs a loss, and Says gave none"):
        model_loss(Says(), {"output": one})


@pytest.mark.parametrize("gamma", [0, -1, float("nan"), float("inf"), "16", True])
def test_gamma_is_a_number_above_zero(gamma: Any):
    with pytest.raises(UserError, match="LoRA-GA: gamma must be a finite number above 0"):
        LoRAGA([], gamma=gamma)
