"""A cut adapter keeps its promise on the dense matrices, acts as it should, and can be merged."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import UserError
from rankwise.io.portable import assemble
from rankwise.lowrank import Factors
from rankwise.methods.trimming import Prefix, cut_to, first_ranks, trim
from rankwise.spectrum import Budget, Energy, MaxError, Promise, Top


def made(dtype: torch.dtype = torch.float32, seed: int = 0, start: bool = False) -> rw.Adapter:
    """Three layers of two sizes; one has exactly rank 2 of 4, one is weak."""
    draw = torch.Generator().manual_seed(seed)

    def factors(out: int, inside: int, size: float = 1.0) -> Factors:
        A = torch.randn(4, inside, generator=draw).to(dtype)
        B = (size * torch.randn(out, 4, generator=draw)).to(dtype)
        if start:
            return Factors(A, B, 0.7, A + 0.25, B * 0.5)
        return Factors(A, B, 0.7)

    own = {"a": factors(9, 12), "b": factors(9, 12, 0.05), "c": factors(20, 6)}
    if not start:
        own["a"].B[:, 2:] = 0
    return assemble(own)


def dense(adapter: rw.Adapter) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, f in adapter.factors.items():
        product = f.B.double().numpy() @ f.A.double().numpy()
        if f.A0 is not None and f.B0 is not None:
            product = product - f.B0.double().numpy() @ f.A0.double().numpy()
        found[name] = f.scale * product
    return found


def error(before: rw.Adapter, after: rw.Adapter) -> float:
    """‖δ − δ'‖ / ‖δ‖ over all layers, by NumPy."""
    first, second = dense(before), dense(after)
    lost = sum(np.linalg.norm(d - second.get(n, 0 * d)) ** 2 for n, d in first.items())
    return float(np.sqrt(lost / sum(np.linalg.norm(d) ** 2 for d in first.values())))


@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
    st.booleans(),
    st.floats(0.001, 0.9),
)
def test_the_error_promised_is_the_error_of_the_dense_matrices(
    dtype: torch.dtype, seed: int, start: bool, wanted: float
) -> None:
    adapter = made(dtype, seed, start)
    found = trim(adapter, MaxError(wanted))
    real = error(adapter, found.adapter)
    assert real <= wanted + 1e-6
    assert found.error == pytest.approx(real, abs=1e-9)
    assert found.allocation.error == pytest.approx(real, abs=1e-6)
    assert found.parameters == found.allocation.parameters
    for name, cut in found.cuts.items():
        kept = found.adapter.factors.get(name)
        assert (kept.r if kept is not None else 0) == cut.after
        assert cut.measured.error == pytest.approx(cut.predicted, abs=1e-6)


def test_energy_one_keeps_the_update_and_drops_the_ranks_that_hold_nothing() -> None:
    adapter = made()
    found = trim(adapter, Energy(1.0))
    assert {n: c.after for n, c in found.cuts.items()} == {"a": 2, "b": 4, "c": 4}
    assert error(adapter, found.adapter) < 1e-6


def test_a_budget_is_kept() -> None:
    found = trim(made(), Budget(60))
    assert found.parameters <= 60
    assert sum(f.A.numel() + f.B.numel() for f in found.adapter.factors.values()) <= 60


def test_the_scale_is_one_so_that_alpha_is_the_rank() -> None:
    found = trim(made(), MaxError(0.2)).adapter
    for name, f in found.factors.items():
        spec = found.method.spec(name)
        assert (spec.r, spec.alpha, spec.scale) == (f.r, float(f.r), 1.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 9), nn.Linear(12, 9), nn.Linear(6, 20)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x[..., :6])], dim=-1)


@pytest.mark.parametrize("promise", [Top(1), Top(3), Energy(0.99), MaxError(0.3), Budget(70)])
def test_a_cut_adapter_acts_as_its_matrices_and_passes_the_certificate(promise: Promise) -> None:
    torch.manual_seed(1)
    model, x = Model().eval(), torch.randn(5, 12)
    bare = model(x)
    cut = trim(made(), promise).adapter
    rw.attach(model, cut)
    matrices = {n: torch.from_numpy(d).float() for n, d in dense(cut).items()}
    changes = [
        (x if name != "c" else x[..., :6]) @ matrices[name].T
        if name in matrices
        else torch.zeros(5, 20 if name == "c" else 9)
        for name in "abc"
    ]
    torch.testing.assert_close(model(x), bare + torch.cat(changes, dim=-1), atol=1e-5, rtol=1e-5)
    assert rw.merge(model, probe=x).passed


def test_an_update_of_rank_zero_is_left_out_and_its_head_stays() -> None:
    head = {"head.weight": torch.ones(2, 2)}
    adapter = replace(made(), modules=("head",), trained=head)
    found = cut_to(adapter, {"a": 1, "b": 0, "c": 2})
    assert list(found.factors) == ["a", "c"]
    assert (found.modules, found.trained) == (("head",), head)


def test_what_hangs_on_an_update_keeps_it_at_rank_one() -> None:
    own = dict(made().factors)
    magnitudes = {n: torch.ones(f.out_features) for n, f in own.items()}
    dora = assemble(own, magnitudes=magnitudes)
    found = trim(dora, MaxError(0.9))
    assert {c.after for c in found.cuts.values()} >= {1}
    assert 0 not in {c.after for c in found.cuts.values()}
    assert found.adapter.magnitudes.keys() == magnitudes.keys()
    biased = assemble(own, biases={"b.bias": torch.ones(9)})
    assert trim(biased, MaxError(0.5)).cuts["b"].after == 1


def test_a_bank_is_cut_as_one() -> None:
    torch.manual_seed(2)
    bank = Factors(torch.randn(3, 4, 6), torch.randn(3, 5, 4), 1.0)
    found = trim(assemble({"experts": bank}), Top(2)).adapter.factors["experts"]
    for whole, a, b in zip(bank.delta(), found.A, found.B, strict=True):
        u, s, vh = np.linalg.svd(whole.numpy())
        np.testing.assert_allclose((b @ a).numpy(), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5)


@pytest.mark.parametrize("start", [False, True])
def test_a_prefix_is_the_first_ranks_as_they_are(start: bool) -> None:
    adapter = made(start=start)
    found = trim(adapter, Prefix(2))
    for name, f in found.adapter.factors.items():
        whole = adapter.factors[name]
        assert torch.equal(f.A, whole.A[:2])
        assert torch.equal(f.B, whole.B[:, :2])
        assert found.adapter.method.spec(name).scale == pytest.approx(whole.scale)
    assert found.error == pytest.approx(error(adapter, found.adapter), abs=1e-6)
    assert trim(adapter, Prefix(9)).parameters == sum(f.count() for f in adapter.factors.values())
    with pytest.raises(UserError, match="of 1 or more"):
        Prefix(0)


def test_a_prefix_keeps_the_same_share_of_every_rank() -> None:
    own = {n: Factors(torch.randn(r, 6), torch.randn(5, r), 1.0) for n, r in (("a", 8), ("b", 3))}
    kept = {
        k: {n: f.r for n, f in trim(assemble(own), Prefix(k)).adapter.factors.items()}
        for k in range(1, 10)
    }
    assert kept[1] == {"a": 1, "b": 1}
    assert kept[3] == {"a": 3, "b": 2}
    assert kept[6] == {"a": 6, "b": 3}
    assert kept[8] == kept[9] == {"a": 8, "b": 3}
    wanted = [math.ceil(Fraction(k * r, most)) for most in (7, 32) for k in (1, 5) for r in (1, 5)]
    assert wanted == [first_ranks(r, k, most) for most in (7, 32) for k in (1, 5) for r in (1, 5)]
