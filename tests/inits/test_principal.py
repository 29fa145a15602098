"""PiSSA and OLoRA against numpy's decompositions and PEFT's own starts."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import UserError
from rankwise.inits import Init, OLoRA, PiSSA, Place, Start
from rankwise.lowrank import Factors

PlaceOf = Callable[..., Place]
BOTH: list[Init] = [PiSSA(), PiSSA(iterations=2), OLoRA()]


def factors(start: Start, scale: float = 2.0) -> Factors:
    """The update at step 0, as a layer makes it."""
    assert start.subtract
    return Factors(start.A, start.B, scale, start.A.clone(), start.B.clone())


def peft_layer(layer: nn.Module, r: int, init: str) -> tuple[Tensor, Tensor, float, Tensor]:
    """PEFT's A, B, s and the weight that it leaves in the base, for one layer."""
    import peft

    config = peft.LoraConfig(
        r=r,
        lora_alpha=3 * r,
        target_modules=["0"],
        init_lora_weights=init,  # type: ignore[arg-type]
        fan_in_fan_out=isinstance(layer, Conv1D),
    )
    made: Any = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    A, B = made.lora_A["default"].weight.detach(), made.lora_B["default"].weight.detach()
    return A, B, made.scaling["default"], made.base_layer.weight.detach()


@given(out=st.integers(2, 24), inside=st.integers(2, 24), seed=st.integers(0, 99), data=st.data())
@pytest.mark.parametrize("init", BOTH, ids=repr)
def test_step_0_is_the_base_exactly(
    place_of: PlaceOf, init: Init, out: int, inside: int, seed: int, data: st.DataObject
):
    torch.manual_seed(seed)
    r = data.draw(st.integers(1, min(out, inside)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    layer = nn.Linear(inside, out, dtype=dtype)
    before = layer.weight.detach().clone()
    start = init.start(place_of(layer, r=r))
    assert start.A.dtype == start.B.dtype == torch.promote_types(dtype, torch.float32)
    assert start.A.is_contiguous()
    assert start.B.is_contiguous()
    made = factors(start)
    assert made.A.abs().max() > 0
    assert made.B.abs().max() > 0
    assert not made.delta().any()
    assert not made.apply(torch.randn(7, inside, dtype=start.A.dtype)).any()
    assert torch.equal(layer.weight, before)


@given(out=st.integers(1, 24), inside=st.integers(1, 24), seed=st.integers(0, 99), data=st.data())
def test_pissa_is_the_best_approximation_shared_equally(
    place_of: PlaceOf, out: int, inside: int, seed: int, data: st.DataObject
):
    torch.manual_seed(seed)
    r = data.draw(st.integers(1, min(out, inside)))
    scale = data.draw(st.floats(0.1, 8))
    layer = nn.Linear(inside, out, dtype=torch.float64)
    start = PiSSA().start(place_of(layer, r=r, scale=scale))
    u, sigma, vh = np.linalg.svd(layer.weight.detach().numpy(), full_matrices=False)
    best = (u[:, :r] * sigma[:r]) @ vh[:r]
    np.testing.assert_allclose(scale * start.B @ start.A, best, atol=1e-10)
    shares = np.diag(sigma[:r] / scale)
    np.testing.assert_allclose(start.B.T @ start.B, shares, atol=1e-10)
    np.testing.assert_allclose(start.A @ start.A.T, shares, atol=1e-10)


@given(out=st.integers(1, 24), inside=st.integers(1, 24), seed=st.integers(0, 99), data=st.data())
def test_olora_is_the_front_of_the_qr_factors(
    place_of: PlaceOf, out: int, inside: int, seed: int, data: st.DataObject
):
    torch.manual_seed(seed)
    r = data.draw(st.integers(1, min(out, inside)))
    layer = nn.Linear(inside, out, dtype=torch.float64)
    start = OLoRA().start(place_of(layer, r=r))
    q, upper = np.linalg.qr(layer.weight.detach().numpy())
    signs = np.where(np.diag(upper)[:r] < 0, -1.0, 1.0)
    np.testing.assert_allclose(start.B, q[:, :r] * signs, atol=1e-9)
    np.testing.assert_allclose(start.A, upper[:r] * signs[:, None], atol=1e-9)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_pissa_is_pefts(place_of: PlaceOf, kind: Any):
    layer = kind(40, 30)
    start = PiSSA().start(place_of(layer, r=6, scale=3.0))
    stored = layer.weight.detach().clone()
    A, B, s, left = peft_layer(layer, 6, "pissa")
    assert s == 3.0
    signs = torch.sign((A * start.A).sum(1))
    torch.testing.assert_close(start.A * signs[:, None], A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start.B * signs, B, rtol=1e-4, atol=1e-5)
    # What PEFT takes from the base is what is subtracted here.
    taken = s * start.B @ start.A
    torch.testing.assert_close(stored - left, taken.T if kind is Conv1D else taken)


def test_randomised_pissa_is_pefts(place_of: PlaceOf):
    layer = nn.Linear(60, 50)
    with torch.no_grad():  # a spectrum that falls, as trained weights have
        u, _, vh = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_((u * 0.8 ** torch.arange(50.0)) @ vh)
    start = PiSSA(iterations=16).start(place_of(layer, r=6, scale=3.0))
    A, B, s, _ = peft_layer(layer, 6, "pissa_niter_16")
    torch.testing.assert_close(s * start.B @ start.A, s * B @ A, rtol=0, atol=1e-4)


def test_olora_is_pefts(place_of: PlaceOf):
    layer = nn.Linear(40, 30)
    start = OLoRA().start(place_of(layer, r=6))
    A, B, _, _ = peft_layer(layer, 6, "olora")
    signs = torch.sign((B * start.B).sum(0))
    torch.testing.assert_close(start.B * signs, B, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start.A * signs[:, None], A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", BOTH, ids=repr)
def test_embeddings_convolutions_parts_and_banks_have_their_starts(
    place_of: PlaceOf, bank_of: PlaceOf, init: Init
):
    fused, rows = nn.Linear(12, 30), tuple(range(0, 30, 2))
    experts = torch.randn(3, 14, 12)
    places = [
        place_of(nn.Embedding(40, 12)),
        place_of(nn.Conv2d(8, 12, 3, groups=2)),
        place_of(fused, rows=rows),
        place_of(fused, rows=slice(10, 25)),
        bank_of(experts),
    ]
    for place in places:
        start = init.start(place, torch.Generator().manual_seed(0))
        lead = () if place.bank is None else (place.bank,)
        assert start.A.shape == (*lead, 4, place.in_features)
        assert start.B.shape == (*lead, place.out_features, 4)
        assert not factors(start).delta().any()
    whole = init.start(places[-1], torch.Generator().manual_seed(0))
    for expert, A, B in zip(experts, whole.A, whole.B, strict=True):
        layer = nn.Linear(12, 14)
        layer.weight.data = expert
        alone = init.start(place_of(layer), torch.Generator().manual_seed(0))
        if init == PiSSA(iterations=2):  # each expert has its own random directions
            assert (2 * B @ A - expert).norm() < 1.1 * (2 * alone.B @ alone.A - expert).norm()
        else:
            torch.testing.assert_close((A, B), (alone.A, alone.B), rtol=1e-4, atol=1e-5)


def test_pissa_of_a_weight_of_low_rank_leaves_no_direction_dead(place_of: PlaceOf):
    layer = nn.Linear(10, 12)
    nn.init.zeros_(layer.weight)
    start = PiSSA().start(place_of(layer))
    assert start.A.any(dim=1).all()
    assert not factors(start).delta().any()


def test_olora_of_a_weight_with_a_column_of_zeros(place_of: PlaceOf):
    # The row of a padding token is such a column of W0ᵀ.
    table = nn.Embedding(20, 8, padding_idx=0)
    start = OLoRA().start(place_of(table))
    torch.testing.assert_close(start.B.T @ start.B, torch.eye(4))
    torch.testing.assert_close(start.A, start.B.T @ table.weight.detach().T)


@pytest.mark.parametrize("init", [PiSSA(), OLoRA()], ids=repr)
def test_a_rank_above_the_smaller_side_is_refused(place_of: PlaceOf, init: Init):
    with pytest.raises(UserError, match=r"'here': .* takes r = 4 .* smaller r in rank_pattern"):
        init.start(place_of(nn.Linear(9, 3), name="here"))


@pytest.mark.parametrize("init", [PiSSA(), PiSSA(iterations=1), OLoRA()], ids=repr)
def test_one_seed_gives_one_start(place_of: PlaceOf, init: Init):
    place = place_of(nn.Linear(90, 70), r=3)
    first, again = (init.start(place, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)


def test_starts_are_values():
    assert PiSSA(iterations=16) == PiSSA(16) != PiSSA()
    assert hash(OLoRA()) == hash(OLoRA())
    with pytest.raises(UserError, match="PiSSA: iterations must be a whole number"):
        PiSSA(iterations=-1)
