"""Frozen quantised layers: base(x) + δ(x) on bitsandbytes and torchao, on the CPU."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.errors import UserError
from rankwise.inits import EVA, LoftQ, PiSSA
from rankwise.layers import bare, dense_weight, is_quantized, quantization

bnb = pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
pytest.importorskip("torchao", reason="the quant extra is not installed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def plain() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def four_bit(net: Net, kind: str = "nf4") -> Net:
    for name, linear in dict(net.named_children()).items():
        made = bnb.nn.Linear4bit(
            linear.in_features,  # type: ignore[arg-type]
            linear.out_features,  # type: ignore[arg-type]
            bias=linear.bias is not None,
            compute_dtype=torch.float32,
            quant_type=kind,
        )
        made.load_state_dict(linear.state_dict())
        made.support_avx512bf16_for_cpu = False  # rounds the base's function in evaluation mode
        setattr(net, name, made.to("cpu"))
    return net


def eight_bit(net: Net) -> Net:
    for name, linear in dict(net.named_children()).items():
        made = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
        )
        made.load_state_dict(linear.state_dict())
        setattr(net, name, made.to("cpu"))
    return net


def weight_only(net: Net) -> Net:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own, on import
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(net, Int8WeightOnlyConfig())
    return net


KINDS = {"4-bit": four_bit, "8-bit": eight_bit, "torchao": weight_only}
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=list(KINDS))
def net(request: pytest.FixtureRequest) -> Net:
    return KINDS[request.param](plain()).requires_grad_(False).eval()


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for update in updates_of(model).values():
            for p in update.trained():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def lora(**options: object) -> rw.LoRA:
    return rw.LoRA(r=2, target_modules="all-linear", head="freeze", **options)  # type: ignore[arg-type]


def is_8_bit(net: Net) -> bool:
    return quantization(bare(net.first)) == "bitsandbytes 8-bit"


@pytest.mark.filterwarnings("ignore:.*inputs will be cast from")
def test_the_update_is_added_to_what_the_quantised_layer_gives(net: Net):
    assert is_quantized(net.first)
    with torch.no_grad():
        before, inner = net(X), net.first(X)
    rw.attach(net, rw.LoRA(r=2, target_modules=["first"], head="freeze"))
    with torch.no_grad():
        assert torch.equal(net(X), before)
        move(net)
        delta = updates_of(net)["first"].dense(net.first)
        torch.testing.assert_close(net.first(X), inner + X @ delta.T, rtol=1e-4, atol=1e-4)
    assert all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:.*inputs will be cast from")
def test_training_moves_the_updates_and_no_bit_of_the_base(net: Net):
    rw.attach(net, lora(bias="adapted"))
    frozen = [dense_weight(bare(layer)).clone() for layer in (net.first, net.second)]
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for layer, before in zip((net.first, net.second), frozen, strict=True):
        assert torch.equal(dense_weight(bare(layer)), before)


@pytest.mark.filterwarnings("ignore:.*inputs will be cast from")
def test_the_dense_weight_is_what_the_layer_multiplies_with(net: Net):
    with torch.no_grad():
        ones = torch.eye(64)
        bias = 0 if net.first.bias is None else net.first.bias
        found = (net.first(ones) - bias).T
    tolerance = 0.02 if is_8_bit(net) else 1e-5
    torch.testing.assert_close(dense_weight(net.first), found, rtol=tolerance, atol=tolerance)
    assert (dense_weight(net.first) - plain().first.weight).abs().max() > 1e-4  # it is quantised


@pytest.mark.filterwarnings("ignore:.*inputs will be cast from")
@pytest.mark.parametrize("keep", [True, False])
def test_merging_gives_a_plain_layer_or_says_why_not(net: Net, keep: bool):
    told = [note for note in rw.attach(net, lora()).notes if "cannot be merged" in note]
    assert len(told) == is_8_bit(net)  # said before anything is trained
    move(net)
    with torch.no_grad():
        before = net(X)
    if is_8_bit(net):
        with pytest.raises(UserError, match=r"rounds its inputs as well.*Load the base unquantis"):
            rw.merge(net, keep=keep, probe=X)
        return
    assert rw.merge(net, keep=keep, probe=X).passed
    assert type(net.first) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(net(X), before, rtol=1e-4, atol=1e-4)
    if keep:
        rw.unmerge(net)
        with torch.no_grad():
            assert torch.equal(net(X), before)
        rw.detach(net)
        assert is_quantized(net.first)


@pytest.mark.filterwarnings("ignore:.*inputs will be cast from")
@pytest.mark.parametrize("options", [{"dora": True}, {"init": PiSSA()}, {"dropout": 0.3}])
def test_variants_start_at_the_quantised_function(net: Net, options: dict[str, object]):
    with torch.no_grad():
        before = net(X)
    if is_8_bit(net) and "dora" in options:
        with pytest.raises(UserError, match="rounds its inputs to 8 bits, and DoRA"):
            rw.attach(net, lora(**options))
        return
    rw.attach(net, lora(**options))
    with torch.no_grad():
        assert torch.equal(net(X), before)


def test_loftq_brings_the_quantised_function_nearer_to_the_original():
    original, net = plain().eval(), four_bit(plain()).eval()
    with torch.no_grad():
        exact, quantised = original(X), net(X)
        rw.attach(net, rw.LoRA(r=16, target_modules="all-linear", head="freeze",
                               init=LoftQ(original)))  # fmt: skip
        started = net(X)
    assert (started - exact).norm() < 0.9 * (quantised - exact).norm()
    rw.detach(net)
    with torch.no_grad():
        assert torch.equal(net(X), quantised)


def reordered(net: Net) -> Net:
    """As a forward pass in evaluation mode leaves it on a CPU with instructions for bfloat16."""
    for layer in (net.first, net.second):
        packed = bnb.functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        layer.weight.data, layer.weight.quant_state = packed
        layer.support_avx512bf16_for_cpu = True
    return net


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_dense_weight_of_a_reordered_layer_is_its_weight_and_leaves_it_so(kind: str):
    wanted = [dense_weight(layer) for layer in four_bit(plain(), kind).children()]
    net = reordered(four_bit(plain(), kind))
    for layer, weight in zip(net.children(), wanted, strict=True):
        stored = layer.weight.data.clone()
        torch.testing.assert_close(dense_weight(layer), weight, rtol=2**-8, atol=1e-6)
        assert torch.equal(layer.weight.data, stored)
        assert layer.weight.quant_state.packing_format_for_cpu


def test_under_adapters_no_evaluation_reorders_a_layer_and_gradients_pass_it():
    net = reordered(four_bit(plain()))
    rw.attach(net, rw.LoRA(r=2, target_modules=["first"], head="freeze"))
    weight = dense_weight(net.second)
    with torch.no_grad():
        net.eval()(X)
    x = X.clone().requires_grad_()
    torch.testing.assert_close(net.train().second(torch.eye(128)), weight.T)
    (grad,) = torch.autograd.grad(net(x).square().sum(), x)
    plain_net = Net().requires_grad_(False)
    plain_net.first.weight.data = dense_weight(bare(net.first))
    plain_net.first.bias.data = net.first.bias.data
    plain_net.second.weight.data = weight
    (wanted,) = torch.autograd.grad(plain_net(x).square().sum(), x)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)
    rw.detach(net)
    assert all(layer.support_avx512bf16_for_cpu for layer in net.children())


@pytest.mark.parametrize("fails", [False, True])
def test_a_start_that_runs_the_model_reorders_no_layer(fails: bool):
    net = four_bit(plain())
    for layer in net.children():
        layer.support_avx512bf16_for_cpu = True
    wanted = [dense_weight(layer) for layer in net.children()]
    method = rw.LoRA(r=2, target_modules=["first"], head="freeze", init=EVA([{"x": X}]))
    if fails:
        broken = replace(method, init=EVA([{"y": X}]))
        with pytest.raises((UserError, TypeError)):
            rw.attach(net, broken)
        assert all(layer.support_avx512bf16_for_cpu for layer in net.children())
    else:
        rw.attach(net, method)
        rw.detach(net)
    assert all(map(torch.equal, map(dense_weight, net.children()), wanted))
