"""What users of PEFT complain of where it costs memory or time; counted, never timed.

The numbers are those of the list that tests/interop/test_pains.py begins.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from counting import kept_for_backward, kernels, walked
from twins import TARGETS, Blocks, relative, shuffle_ours, two, with_peft, with_rankwise

peft = pytest.importorskip("peft")
optimizers = pytest.importorskip("peft.optimizers")


# --- 6. dtypes -----------------------------------------------------------------------------------


def test_6_beside_a_bfloat16_base_no_activation_is_made_in_float32():
    base, x = Blocks().bfloat16(), torch.randn(64, 16).bfloat16()
    theirs = with_peft(base, **TARGETS)
    ours = with_rankwise(base, **TARGETS)
    assert kernels(theirs, x).wide >= 8 * 2 * x.nbytes  # a copy of each input at least
    assert kernels(ours, x).wide == 0
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}


# --- 7. memory -----------------------------------------------------------------------------------


class Shared(nn.Module):
    """Query, key and value on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({n: nn.Linear(64, 64) for n in ("query", "key", "value")})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts.values()])


@pytest.mark.parametrize(
    ("options", "here", "there"),
    [({}, 1.06, 6), ({"dropout": 0.05}, 1.06, 12), ({"freeze_A": True}, 0.06, 0.09)],
    ids=["plain", "dropout", "LoRA-FA"],
)
def test_7_less_is_kept_for_backward(options: dict[str, Any], here: float, there: float):
    """In units of the input, which query, key and value share: here at most, there at least."""
    base = Shared().bfloat16()
    x = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=True)
    names = {"r": 1, "target_modules": ["query", "key", "value"]}
    theirs = with_peft(base, lora_dropout=options.get("dropout", 0.0), **names)
    if "freeze_A" in options:
        optimizers.create_lorafa_optimizer(theirs, r=1, lora_alpha=1, lr=0.1)  # it freezes A
    assert kept_for_backward(theirs, x) > there
    assert kept_for_backward(with_rankwise(base, **names, **options), x) < here


# --- 8. slow attaching and switching -------------------------------------------------------------


def test_8_attaching_walks_little_and_switching_not_at_all():
    base = Blocks(16)
    with walked() as there:
        theirs = with_peft(base, **TARGETS)
    with walked() as here:
        ours = with_rankwise(base, **TARGETS)
    assert here[0] < there[0] / 3
    theirs.add_adapter("second", peft.LoraConfig(r=2, **TARGETS))
    with_rankwise(ours, "second", **TARGETS)
    with walked() as there:
        theirs.set_adapter("second")
    with walked() as here:
        rw.set_active(ours, "second")
    assert there[0] > 500
    assert here[0] == 0


# --- 11. torch.compile ---------------------------------------------------------------------------


def counting(model: nn.Module) -> tuple[Any, list[int]]:
    """The model compiled as one graph, and how often it is."""
    times = [0]

    def backend(graph: Any, _: Any) -> Any:
        times[0] += 1
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True), times


def test_11_another_adapter_or_scale_is_data_and_not_code():
    base, x = two()
    names = {"target_modules": ["first"]}
    theirs = with_peft(base, **names)
    compiled, times = counting(theirs)
    with torch.no_grad():
        for scale in (1.0, 2.0, 3.0):
            theirs.base_model.model.first.set_scale("default", scale)
            compiled(x)
    assert times[0] > 1
    others: list[Any] = []
    for r in (1, 3):
        alone = with_rankwise(copy.deepcopy(base), **names, r=r, alpha=5 * r)
        shuffle_ours(alone)
        others.append(alone)
    ours = with_rankwise(base, **names, slot=4)
    compiled, times = counting(ours)
    with torch.no_grad():
        compiled(x)
        for alone in others:
            rw.hotswap(ours, rw.adapter_of(alone))
            assert relative(compiled(x), alone(x)) < 1e-12
    assert times == [1]


# --- 14. unmerged inference ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_14_an_unmerged_layer_calls_fewer_kernels(dtype: torch.dtype):
    base, x = Blocks().to(dtype), torch.randn(2, 16, dtype=dtype)
    plain = kernels(base, x).calls
    there = kernels(with_peft(base, **TARGETS), x).calls - plain
    here = kernels(with_rankwise(base, **TARGETS), x).calls - plain
    assert here < there
    if dtype is torch.float32:
        assert (here, there) == (8 * 2, 8 * 4)  # A x, and the rest in one; four one by one
