"""Nested training: the ranks that a step shows, what it leaves alone, and what cuts are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import low_rank_updates
from rankwise.methods.trimming import Prefix, trim
from rankwise.train.config import FitConfig
from rankwise.train.nested import Nested
from rankwise.train.run import fit


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def adapted(seed: int = 0, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = Model()
    options: dict[str, Any] = {"r": 4, "target_modules": ["a", "b"], "head": "freeze"}
    rw.attach(model, rw.LoRA(**{**options, **more}))
    for update in low_rank_updates(model).values():
        update.lora_A.data += 0.3 * torch.randn_like(update.lora_A)
        update.lora_B.data += 0.3 * torch.randn_like(update.lora_B)
    return model


@pytest.mark.parametrize(
    "more", [{}, {"init": rw.PiSSA()}, {"dora": True}, {"rank_pattern": {"a": 2}}]
)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_step_sees_the_first_ranks_as_if_the_adapter_were_cut(
    k: int, more: dict[str, Any]
) -> None:
    model, x = adapted(**more), torch.randn(6, 12)
    whole = rw.adapter_of(model)
    cut = {n: -(-k * f.r // 4) for n, f in whole.factors.items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with Nested(model, 0).first(k):
        found = model(x)
        found.square().sum().backward()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for name, update in low_rank_updates(model).items():
        grads = update.lora_A.grad, update.lora_B.grad
        assert grads[0] is not None
        assert grads[1] is not None
        assert grads[1][:, : cut[name]].any()
        assert not grads[0][cut[name] :].any()
        assert not grads[1][:, cut[name] :].any()
    alone = adapted(**more)
    rw.detach(alone)
    rw.attach(alone, trim(whole, Prefix(k)).adapter)
    torch.testing.assert_close(found, alone(x), atol=1e-5, rtol=1e-5)


def test_all_numbers_are_put_back_when_a_step_fails() -> None:
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="memory"), Nested(model, 0).first(1):
        raise RuntimeError("memory")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_every_doubling_of_the_rank_is_drawn_alike_and_follows_from_seed_and_step() -> None:
    nested, count = Nested(adapted(r=31), 5), 6000
    drawn = Counter(nested.rank(step) for step in range(count))
    octaves = [sum(drawn[k] for k in range(2**i, 2 ** (i + 1))) for i in range(5)]
    assert sum(octaves) == count
    assert all(abs(n - count / 5) < 4 * (count * 0.2 * 0.8) ** 0.5 for n in octaves)
    assert set(drawn) == set(range(1, 32))
    again, other = Nested(adapted(r=31), 5), Nested(adapted(r=31), 6)
    assert [nested.rank(s) for s in range(50)] == [again.rank(s) for s in range(50)]
    assert [nested.rank(s) for s in range(50)] != [other.rank(s) for s in range(50)]
    assert {Nested(adapted(r=1), 5).rank(s) for s in range(50)} == {1}


def learned(nested: bool) -> rw.Adapter:
    """A linear layer that learns a target whose singular values fall, for as many steps."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    u, v = (torch.linalg.qr(torch.randn(16, 16)).Q for _ in range(2))
    sizes = torch.tensor([4.0, 3.0, 2.0, 1.0] + [0.0] * 12)
    target = model[0].weight.detach() + (u * sizes) @ v.T
    rw.attach(model, rw.LoRA(r=4, target_modules=["0"], head="freeze"))
    shown = Nested(model, 3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(1500):
        x = torch.randn(64, 16)
        optimizer.zero_grad()
        with shown.first(shown.rank(step) if nested else 4):
            (model(x) - x @ target.T).square().mean().backward()
        optimizer.step()
    return rw.adapter_of(model)


def test_the_first_ranks_of_nested_training_are_nearly_the_best_of_their_number() -> None:
    """The best are the singular values' own: after k of 4, 3, 2, 1 the rest is known."""
    nested, plain = learned(nested=True), learned(nested=False)
    for k in (1, 2, 3):
        best = sum(s**2 for s in (4, 3, 2, 1)[k:]) ** 0.5
        own, other = (trim(a, Prefix(k)).cuts["0"].measured.lost for a in (nested, plain))
        assert own < 1.15 * best
        assert other > 1.15 * best


def test_a_nested_run_goes_on_as_if_it_had_not_stopped(
    options: Callable[..., FitConfig], tmp_path: Path, look: Any
) -> None:
    runs = [fit(options(tmp_path / n, train_nested=True, r=4)).folder for n in ("one", "two")]
    plain = fit(options(tmp_path / "plain", r=4)).folder
    first, second, other = (look.tensors(run / "adapter") for run in (*runs, plain))
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert any(not torch.equal(t, other[n]) for n, t in first.items())
