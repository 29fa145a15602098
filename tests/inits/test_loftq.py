"""LoftQ: the correction of a quantised weight against numpy, and what it asks of its weights."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import UserError
from rankwise.inits import LoftQ, Place
from rankwise.lowrank import Factors

PlaceOf = Callable[..., Place]


def rounded(weight: Tensor) -> Tensor:
    """A weight on a coarse grid of 15 values, as 4 bits have."""
    step = weight.abs().max() / 7
    return (weight / step).round() * step


def quantised(layer: nn.Module) -> nn.Module:
    made = copy.deepcopy(layer)
    with torch.no_grad():
        made.get_parameter("weight").copy_(rounded(layer.get_parameter("weight")))
    return made


LAYERS = [(nn.Linear, 20, 12), (Conv1D, 12, 20), (nn.Conv2d, 5, 12, 2), (nn.Embedding, 20, 12)]


@pytest.mark.parametrize(("kind", "sizes"), [(k, s) for k, *s in LAYERS])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_it_is_the_best_correction_of_rank_r(
    place_of: PlaceOf, kind: type[nn.Module], sizes: list[int], scale: float
):
    layer = kind(*sizes).double()
    base = quantised(layer)
    place = place_of(base, r=3, scale=scale)
    original = place_of(layer).weight().numpy()
    start = LoftQ({"layer.weight": layer.get_parameter("weight")}).start(place)
    assert not start.subtract
    lost = original - place.weight().numpy()
    u, sigma, vh = np.linalg.svd(lost, full_matrices=False)
    delta = Factors(start.A, start.B, scale).delta().numpy()
    np.testing.assert_allclose(delta, (u[:, :3] * sigma[:3]) @ vh[:3], atol=1e-10)
    assert np.linalg.norm(lost - delta) < np.linalg.norm(lost)


def test_it_is_pefts_with_a_scale_of_one(place_of: PlaceOf):
    # PEFT 0.21 does not divide by s, so its correction is right for s = 1 only.
    from peft.utils.loftq_utils import _low_rank_decomposition

    layer = nn.Linear(20, 12)
    base = quantised(layer)
    lost = (layer.weight - base.get_parameter("weight")).detach()
    theirs = _low_rank_decomposition(lost, reduced_rank=4)
    start = LoftQ({"layer": layer.weight}).start(place_of(base, scale=1.0))
    torch.testing.assert_close(start.B @ start.A, theirs["L"] @ theirs["R"])
    torch.testing.assert_close(start.B.abs(), theirs["L"].abs(), rtol=1e-3, atol=1e-5)


def test_it_corrects_a_weight_of_bitsandbytes(place_of: PlaceOf):
    bnb = pytest.importorskip("bitsandbytes")
    layer = nn.Linear(64, 96, bias=False)
    base = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4")
    base.load_state_dict(layer.state_dict())
    base.to("cpu")
    given = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    place = replace(place_of(layer, r=16), module=base, weight=lambda: given)
    lost = layer.weight.detach() - given
    before = base.weight.data.clone()
    start = LoftQ(nn.ModuleDict({"layer": layer})).start(place)
    tail = np.linalg.svd(lost.numpy())[1][16:]
    left = lost - 2 * start.B @ start.A
    assert left.norm().item() == pytest.approx(np.linalg.norm(tail), rel=1e-4)
    assert torch.equal(base.weight.data, before)


@pytest.mark.parametrize("as_module", [True, False])
def test_the_weights_may_be_a_model_or_its_tensors(place_of: PlaceOf, as_module: bool):
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 9))
    given = model if as_module else model.state_dict()
    place = place_of(quantised(model[1]), name="1")
    expected = LoftQ({"1": model[1].weight}).start(place)
    found = LoftQ(given).start(place)
    assert torch.equal(found.A, expected.A)
    assert torch.equal(found.B, expected.B)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_square_weight_is_read_the_way_round_it_was_quantised(
    place_of: PlaceOf, kind: type[nn.Module]
):
    layer = kind(16, 16)
    stored = layer.get_parameter("weight").detach()
    matrix = stored.T if kind is Conv1D else stored
    base = nn.Linear(16, 16)  # bitsandbytes makes a Linear of a Conv1D, and turns the weight
    base.weight.data = rounded(matrix)
    found = LoftQ(nn.ModuleDict({"layer": layer})).start(place_of(base, r=16))
    torch.testing.assert_close(base.weight.data + 2 * found.B @ found.A, matrix)


@pytest.mark.parametrize("rows", [tuple(range(8, 16)), slice(8, 16)], ids=str)
def test_a_part_of_a_fused_projection_takes_its_rows(
    place_of: PlaceOf, rows: tuple[int, ...] | slice
):
    fused = nn.Linear(10, 24)
    place = place_of(quantised(fused), r=8, name="attn.qkv.k_proj", rows=rows)
    start = LoftQ({"attn.qkv.weight": fused.weight}).start(place)
    wanted = fused.weight.detach()[8:16]
    torch.testing.assert_close(place.weight() + 2 * start.B @ start.A, wanted)
    part = LoftQ({"attn.qkv.k_proj": wanted}).start(place)
    torch.testing.assert_close(part.B @ part.A, start.B @ start.A)


@pytest.mark.parametrize("turned", [False, True])
def test_a_bank_is_corrected_weight_by_weight(bank_of: PlaceOf, turned: bool):
    experts = torch.randn(3, 7, 5)
    place = bank_of(rounded(experts), r=5)
    given = {"experts.gate_up_proj": experts.mT.contiguous() if turned else experts}
    start = LoftQ(given).start(place)
    torch.testing.assert_close(place.weight() + 2 * start.B @ start.A, experts)


def test_where_nothing_was_lost_the_start_is_kaimings(place_of: PlaceOf):
    for layer in (nn.Linear(9, 8), nn.Embedding(9, 8)):
        start = LoftQ({"layer.weight": layer.weight}).start(place_of(layer))
        assert not Factors(start.A, start.B, 2.0).delta().any()
        random = start.B if isinstance(layer, nn.Embedding) else start.A
        assert (random != 0).all()


def test_power_iterations_come_near_the_exact_form(place_of: PlaceOf):
    layer = nn.Linear(90, 70)
    base = quantised(layer)
    lost = (layer.weight - base.get_parameter("weight")).detach()

    def left(iterations: int | None) -> float:
        start = LoftQ({"layer": layer.weight}, iterations).start(place_of(base, r=8))
        return float((lost - 2 * start.B @ start.A).norm())

    exact, near = left(None), left(8)
    assert exact <= near < 1.002 * exact


def test_what_is_missing_or_does_not_fit_is_an_error(place_of: PlaceOf):
    layer = nn.Linear(9, 8)
    place = place_of(quantised(layer), name="block.query")
    with pytest.raises(UserError, match=r"no 'block.query.weight'. Did you mean 'block.querry.we"):
        LoftQ({"block.querry.weight": layer.weight}).start(place)
    for shape in ((9, 9), (72,), ()):
        with pytest.raises(UserError, match=r"'block.query' of shape .* not the shape of \(8, 9\)"):
            LoftQ({"block.query": torch.zeros(shape)}).start(place)
    broken = layer.weight.detach().clone()
    broken[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"'block.query': LoftQ was given .* non-finite"):
        LoftQ({"block.query": broken}).start(place)
    with pytest.raises(UserError, match=r"as far from 'block.query' as zero would be"):
        LoftQ({"block.query": torch.randn(8, 9)}).start(place)
    with pytest.raises(UserError, match=r"'block.query': LoftQ takes r = 9"):
        LoftQ({}).start(replace(place, r=9))


def test_a_part_beyond_the_given_weight_is_an_error(place_of: PlaceOf):
    fused = nn.Linear(8, 24)
    place = place_of(fused, name="qkv.v_proj", rows=tuple(range(16, 24)))
    with pytest.raises(UserError, match=r"'qkv.weight' of shape \(8, 9\)"):
        LoftQ({"qkv.weight": torch.zeros(8, 9)}).start(place)


def test_its_weights_are_not_printed():
    assert repr(LoftQ({"a": torch.zeros(2)})) == "LoftQ(iterations=None)"
