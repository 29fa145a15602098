"""optimize_frozen on whole models: what is packed, what stays as it was, and the way back."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.kernels import PackedLinear, can_pack
from rankwise.layers import LoRALinear, packing

if not can_pack(torch.zeros(1, 1)):  # pragma: no cover - a build of torch without oneDNN
    pytest.skip("this torch has no oneDNN to pack weights for", allow_module_level=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.query(x).relu() * self.value(x)))


def model(adapted: bool = True) -> nn.Module:
    torch.manual_seed(0)
    made = Block().requires_grad_(False)
    if adapted:
        rw.attach(made, rw.LoRA(r=2, alpha=4, target_modules=["query", "value"], head="freeze"))
        for layer in (made.query, made.value):
            assert isinstance(layer, LoRALinear)
            nn.init.normal_(layer.update.lora_B)
    return made


def gradients(made: nn.Module, x: Tensor) -> list[Tensor]:
    trained = [p for p in made.parameters() if p.requires_grad]
    return [made(x).detach(), *torch.autograd.grad(made(x).square().sum(), trained)]


def test_every_frozen_layer_is_packed_and_computes_the_same() -> None:
    made, x = model(), torch.randn(5, 16)
    before, keys = gradients(made, x), list(made.state_dict())
    done = rw.optimize_frozen(made, rows=5, measure=False)
    assert done.packed == ("query.base_layer", "value.base_layer", "out", "head")
    assert done.bytes == 2 * 4 * (3 * 16 * 16 + 3 * 16)
    assert done.ratios == {}
    assert list(made.state_dict()) == keys
    for ours, plain in zip(gradients(made, x), before, strict=True):
        torch.testing.assert_close(ours, plain)


def test_the_way_back_is_bit_for_bit() -> None:
    made, x = model(), torch.randn(5, 16)
    before = gradients(made, x)
    rw.optimize_frozen(made, measure=False)
    assert rw.restore_frozen(made) == 4
    assert rw.restore_frozen(made) == 0
    assert not any("forward" in vars(m) for m in made.modules())
    assert all(map(torch.equal, gradients(made, x), before))


def test_the_adapted_layers_run_on_the_packed_kernels() -> None:
    made, x = model(), torch.randn(5, 16)
    rw.optimize_frozen(made, measure=False)
    with torch.profiler.profile() as profile:
        gradients(made, x)
    calls = {event.key: event.count for event in profile.key_averages()}
    # twice forward; backward once through out and head: x needs no gradient, so q and v need none
    assert calls["mkldnn::_linear_pointwise"] == 2 * 4 + 2


def test_what_trains_or_is_hooked_is_left_alone() -> None:
    made = model(adapted=False)
    made.query.requires_grad_()
    made.value.bias.requires_grad_()
    made.out.register_forward_hook(lambda module, args, y: y)
    assert rw.optimize_frozen(made, measure=False).packed == ("head",)


def test_by_measurement_what_is_slower_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_LEAST", 0)
    made = model(adapted=False)
    done = rw.optimize_frozen(made, rows=64)
    assert set(done.ratios) == {(16, 16), (3, 16)}
    fast = {shape for shape, ratio in done.ratios.items() if ratio <= 0.95}
    wanted = [n for n, m in made.named_children() if tuple(m.weight.shape) in fast]
    assert list(done.packed) == wanted
    packed = [
        n for n, m in made.named_children() if isinstance(vars(m).get("forward"), PackedLinear)
    ]
    assert packed == wanted


def test_small_weights_are_not_measured_and_stay_plain() -> None:
    assert rw.optimize_frozen(model(), rows=64) == rw.Packing((), 0, {})


def test_called_again_it_packs_what_was_written_since() -> None:
    made, x = model(), torch.randn(5, 16)
    first = rw.optimize_frozen(made, rows=5, measure=False)
    made.out.weight.mul_(2)
    wanted = made(x)
    assert rw.optimize_frozen(made, rows=5, measure=False) == first
    with torch.profiler.profile() as profile:
        found = made(x)
    torch.testing.assert_close(found, wanted)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 4


def test_rows_below_one_are_refused() -> None:
    with pytest.raises(rw.UserError, match="rows must be 1 or more, got 0"):
        rw.optimize_frozen(model(), rows=0)


def _merge(made: nn.Module, x: Tensor) -> nn.Module:
    rw.merge(made)
    return made


def _detach(made: nn.Module, x: Tensor) -> nn.Module:
    rw.detach(made)
    return made


def _copy(made: nn.Module, x: Tensor) -> nn.Module:
    return copy.deepcopy(made)


@pytest.mark.parametrize("then", [_merge, _detach, _copy])
def test_the_other_verbs_do_what_they_do_without_it(
    then: Callable[[nn.Module, Tensor], nn.Module],
) -> None:
    x = torch.randn(5, 16)
    plain, packed = model(), model()
    rw.optimize_frozen(packed, measure=False)
    one, other = then(plain, x), then(packed, x)
    torch.testing.assert_close(one(x), other(x))
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    tensors = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in tensors)
