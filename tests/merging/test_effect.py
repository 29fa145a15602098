"""What updates do: measured one by one, and refused when they do nothing."""

import pytest
import torch
from torch import nn

import rankwise
from rankwise.attaching import lora_layers
from rankwise.errors import UserError
from rankwise.merging import EffectError, check_effect, effects, merge
from rankwise.merging.effect import at_rest, difference, full_float32, outputs


class Twisted(nn.Module):
    """Owners of every kind: one that computes, one that reads .weight, one that does neither."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4, bias=False)
        self.bypassed = nn.Linear(4, 4, bias=False)
        self.discarded = nn.Linear(4, 4, bias=False)
        self.private = self.bypassed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.discarded(x)
        return self.used(x) @ self.read.weight.T @ self.private.T


@pytest.fixture
def twisted(trained):
    def build(*targets: str) -> Twisted:
        model = Twisted()
        rankwise.attach(
            model, rankwise.LoRA(r=2, target_modules=list(targets), head="freeze", dropout=0.3)
        )
        trained(model, 0.5)
        return model

    return build


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, 4)


# --- effects -------------------------------------------------------------------------------------


def test_effects_are_the_changes_when_one_update_is_zero(net, ids):
    model = net().train()
    found = effects(model, ids)
    assert all(m.training for m in model.modules())
    model.eval()
    with torch.no_grad():
        whole = model(ids)
        for name, layer in lora_layers(model).items():
            kept = layer.update.lora_B.clone()
            layer.update.lora_B.zero_()
            assert found[name] == pytest.approx(float((model(ids) - whole).abs().max()), rel=1e-4)
            layer.update.lora_B.copy_(kept)
    assert list(found) == list(lora_layers(model))
    assert min(found.values()) > 0


def test_effects_see_through_owners(twisted, x):
    found = effects(twisted("used", "read", "bypassed", "discarded"), x)
    assert found["used"] > 0.01
    assert found["read"] > 0.01
    assert found["bypassed"] == found["discarded"] == 0


def test_a_merged_model_has_no_updates_to_measure(net, ids):
    model = net()
    merge(model)
    for verb in (effects, check_effect):
        with pytest.raises(UserError, match="unmerge"):
            verb(model, ids)


# --- check_effect --------------------------------------------------------------------------------


def test_a_trained_adapter_passes(net, ids):
    check_effect(net())
    check_effect(net(), ids)
    check_effect(net(), ids, each=True)


def test_updates_that_never_trained_are_named_together(net, ids):
    model = net()
    layers = lora_layers(model)
    layers["blocks.0.up"].update.lora_B.data.zero_()
    layers["blocks.1.down"].update.lora_A.data.zero_()
    with pytest.raises(EffectError) as caught:
        check_effect(model)
    message = str(caught.value)
    assert "'blocks.0.up': lora_B is all zeros" in message
    assert "'blocks.1.down': lora_A is all zeros" in message
    assert "blocks.0.down" not in message
    assert caught.value.exit_code == 3


def test_an_embedding_that_never_trained_is_named_by_its_zero_factor(net):
    model = net()
    lora_layers(model)["embed"].update.lora_A.data.zero_()
    with pytest.raises(EffectError, match="'embed': lora_A is all zeros"):
        check_effect(model)


def test_an_adapter_without_any_effect_is_refused(twisted, x):
    with pytest.raises(EffectError, match=r"same with the adapter and without it.*'bypassed'"):
        check_effect(twisted("bypassed", "discarded"), x)


def test_an_owner_that_never_runs_the_layer_is_asked_for_it(twisted, x):
    check_effect(twisted("used", "read"), x)
    model = twisted("used", "read", "bypassed", "discarded")
    with pytest.raises(EffectError, match=r"'bypassed'.*its forward was not called") as caught:
        check_effect(model, x)
    assert "discarded" not in str(caught.value)
    assert "'read'" not in str(caught.value)


def test_every_layer_is_asked_on_request(twisted, x):
    check_effect(twisted("used", "discarded"), x)
    with pytest.raises(EffectError, match=r"'discarded'.*what it computes does not reach"):
        check_effect(twisted("used", "discarded"), x, each=True)


def test_few_runs_are_enough_when_every_layer_is_called(net, ids):
    model = net()
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    check_effect(model, ids)
    assert len(runs) == 2


def test_layers_of_encoders_and_attention_count_as_effective(trained):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    targets = ["linear1", "linear2", "out_proj"]
    rankwise.attach(layer, rankwise.LoRA(r=2, target_modules=targets, head="freeze"))
    trained(layer, 0.5)
    check_effect(layer, torch.randn(2, 3, 8), each=True)


def test_methods_without_updates_have_no_effect_to_check(ids):
    model = nn.Sequential(nn.Embedding(40, 4), nn.Flatten(), nn.Linear(28, 3))
    rankwise.attach(model, rankwise.HeadOnly())
    check_effect(model, ids)
    assert effects(model, ids) == {}


# --- running a model -----------------------------------------------------------------------------


def test_a_run_leaves_modes_and_random_numbers_alone(net, ids):
    model = net().train()
    model.blocks[1].drop.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    check_effect(model, ids)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_are_the_same_in_every_run(x):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    assert torch.equal(*(outputs(Noisy(), x)[0] for _ in range(2)))


def test_products_of_float32_are_not_shortened(x):
    torch.set_float32_matmul_precision("medium")
    try:
        with full_float32():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_autocast_of_the_caller_does_not_reach_the_run(x):
    model = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16), at_rest(model):
        assert outputs(model, x)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (lambda x: x, 1),
        (lambda x: (x, x.long(), "text", x * 2), 2),
        (lambda x: [x], 1),
        (lambda x: {"loss": x.sum(), "logits": x}, 1),
        (lambda x: {"start": x, "end": x, "ids": x.long()}, 2),
    ],
    ids=["tensor", "tuple", "list", "logits", "mapping"],
)
def test_outputs_of_every_form_are_found(x, result, expected):
    class Returns(nn.Module):
        def forward(self, x):
            return result(x)

    found = outputs(Returns(), x)
    assert len(found) == expected
    assert torch.equal(found[0], x)


@pytest.mark.parametrize("result", [lambda x: None, lambda x: x.long(), lambda x: {}])
def test_outputs_without_numbers_are_refused(x, result):
    class Returns(nn.Module):
        def forward(self, x):
            return result(x)

    with pytest.raises(UserError, match="without a floating-point tensor"):
        outputs(Returns(), x)


@pytest.mark.parametrize("probe", [(1.0, 2.0), [1.0, 2.0], {"b": 2.0, "a": 1.0}])
def test_probes_of_every_form_reach_the_model(probe):
    class Adds(nn.Module):
        def forward(self, a, b):
            return torch.tensor([a, b])

    assert outputs(Adds(), probe)[0].tolist() == [1.0, 2.0]


def test_differences_count_infinities_shapes_and_nan():
    inf, nan = float("inf"), float("nan")
    one = torch.tensor([1.0, -inf, 3.0])
    assert difference([one], [torch.tensor([1.5, -inf, 3.0])]) == 0.5
    assert difference([one], [torch.tensor([1.0, 2.0, 3.0])]) == inf
    assert difference([one], [one[:2]]) == inf
    assert difference([one, one], [one]) == inf
    unknown = difference([torch.zeros(1), one], [torch.ones(1), torch.tensor([nan, 0.0, 0.0])])
    assert unknown != unknown
    assert difference([torch.zeros(0)], [torch.zeros(0)]) == 0
