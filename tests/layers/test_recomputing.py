"""What may be made again, told by running it: norms, activations, gated MLPs, and what is none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations

import rankwise as rw
from rankwise.layers.recomputing import Keeps, gated_form, keeps, numbers


class WrittenNorm(nn.Module):
    """A root mean square norm in operators of torch, in float32 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(5, 21) / 10, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class ApartNorm(WrittenNorm):
    """It reads x twice in x's own dtype, so that its gradient is added up in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)))).to(
            x.dtype
        )


class RandomNorm(WrittenNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize(
    ("make", "dtype", "wanted"),
    [
        (WrittenNorm, torch.bfloat16, Keeps.MORE),
        (WrittenNorm, torch.float32, Keeps.INPUT),
        (ApartNorm, torch.bfloat16, Keeps.OTHER),
        (RandomNorm, torch.float32, Keeps.OTHER),
        (lambda: nn.LayerNorm(16).requires_grad_(False), torch.float32, Keeps.INPUT),
        (lambda: nn.RMSNorm(16).requires_grad_(False), torch.float32, Keeps.INPUT),
    ],
)
def test_what_norms_keep(make: Callable[[], nn.Module], dtype: torch.dtype, wanted: Keeps):
    norm = make().eval()
    assert keeps(norm.to(dtype), numbers(8, 16).to(dtype), shared=True) is wanted
    assert not norm.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (nn.GELU(), Keeps.INPUT),
        (nn.SiLU(), Keeps.INPUT),
        (activations.GELUActivation(), Keeps.INPUT),
        (activations.NewGELUActivation(), Keeps.MORE),
        (activations.QuickGELUActivation(), Keeps.MORE),
        (activations.ReLUSquaredActivation(), Keeps.MORE),
        (nn.ReLU(), Keeps.OTHER),  # they keep their output, which the next layer keeps as well
        (nn.Tanh(), Keeps.OTHER),
        (nn.Sigmoid(), Keeps.OTHER),
        (nn.Softmax(-1), Keeps.OTHER),
        (nn.SiLU(inplace=True), Keeps.OTHER),
        (nn.RReLU(), Keeps.OTHER),
        (nn.GLU(), Keeps.OTHER),
        (nn.Identity(), Keeps.OTHER),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_activations_keep(module: nn.Module, wanted: Keeps, dtype: torch.dtype):
    assert keeps(module, numbers(8, 16).to(dtype), shared=False) is wanted


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24), nn.Linear(16, 24)
        self.down_proj = nn.Linear(24, 16)
        self.act_fn = nn.SiLU()
        self.limit, self.p = 7.0, 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Bounded(MLP):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


class Dropping(MLP):
    def forward(self, x: Tensor) -> Tensor:
        made = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(F.dropout(made, self.p, self.training))


class Swapped(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Added(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Larger(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)


class Scaled(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Learned(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.PReLU()


@pytest.mark.parametrize("kind", [Bounded, Dropping, Swapped, Added, Larger, Scaled, Learned])
def test_a_module_that_does_more_than_a_gated_mlp_is_none(kind: type[MLP]):
    assert gated_form(MLP()) is not None
    assert gated_form(kind()) is None


def test_the_trial_writes_nothing_and_draws_nothing():
    module = nn.Sequential(MLP(), WrittenNorm(), nn.GELU()).bfloat16().eval()
    state, keys = torch.get_rng_state(), [set(vars(m)) for m in module.modules()]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    done = rw.recompute_activations(module)
    assert done == rw.Recomputation(("1",), ("2",), ("0",))
    rw.keep_activations(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert [set(vars(m)) for m in module.modules()] == keys
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert not any(m.training for m in module.modules())


def test_what_trains_or_has_a_forward_of_its_own_is_left_alone():
    norm, mlp, act = WrittenNorm().bfloat16(), MLP(), nn.GELU()
    norm.weight.requires_grad_()
    for module in (mlp, mlp.act_fn, act):
        vars(module)["forward"] = lambda x: x
    assert rw.recompute_activations(nn.Sequential(norm, mlp, act)) == rw.Recomputation((), (), ())


def test_the_trial_needs_no_data_of_the_model():
    with torch.device("meta"):
        model = nn.Sequential(WrittenNorm(), MLP(), nn.GELU()).requires_grad_(False).bfloat16()
    assert rw.recompute_activations(model) == rw.Recomputation(("0",), ("2",), ("1",))
    x = torch.empty(3, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


def test_arguments_by_name_or_beside_go_to_the_modules_own_forward():
    module = nn.Sequential(MLP(), nn.GELU())
    x = torch.randn(2, 16)
    wanted = module(x)
    rw.recompute_activations(module)
    assert torch.equal(module[1](input=module[0](x=x)), wanted)
    with pytest.raises(TypeError, match="positional arguments"):
        module[0](x, x)
