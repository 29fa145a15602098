"""W0 + L R in blocks: the exact sum rounded once, whatever the block, layout and adapters."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise.attaching import lora_layers
from rankwise.layers import Spec, wrap
from rankwise.merging.blocks import RUN, Runs, Spares, Sum, held, sum_of, widened
from rankwise.merging.fold import plain, streamed


def of(kind: str, dtype: torch.dtype):
    torch.manual_seed(0)
    base = {
        "linear": lambda: nn.Linear(33, 21),
        "conv": lambda: Conv1D(21, 33),
        "embedding": lambda: nn.Embedding(33, 21),
    }[kind]()
    layer = wrap(base.to(dtype), Spec(4, 6.0))
    for factor in (layer.update.lora_A, layer.update.lora_B):
        factor.data.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("size", [1, 100, 2**19])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_all_of_it_is_the_exact_sum_rounded_once(kind, dtype, size):
    layer = of(kind, dtype)
    stored = layer.base_weight("weight")
    with torch.no_grad():
        found = sum_of(layer, "weight", stored).whole(size)
        delta = layer.update.lora_B.double().numpy() @ layer.update.lora_A.double().numpy() * 1.5
    exact = stored.double().numpy() + (delta if kind == "linear" else delta.T)
    assert found.dtype == dtype
    off = np.abs(found.double().numpy() - exact)
    wide = 1e-6 if dtype != torch.float64 else 1e-15
    assert (off <= torch.finfo(dtype).eps / 2 * np.abs(exact) + wide).all()


def test_adapters_add_up_and_what_is_more_than_a_product_is_left_to_others():
    model = nn.Sequential(nn.Linear(8, 6))
    for name in ("one", "two"):
        rankwise.attach(model, rankwise.LoRA(r=2, target_modules=["0"]), name=name)
    (layer,) = lora_layers(model).values()
    for update in layer.updates.values():
        update.lora_B.data.normal_()
    stored = layer.base_weight("weight")
    with torch.no_grad():
        expected = stored + sum(u.factors().delta() for u in layer.updates.values())
        total = sum_of(layer, "weight", stored)
        torch.testing.assert_close(total.whole(), expected)
    assert total.norm() == pytest.approx(float((expected - stored).norm()), rel=1e-5)
    dora = wrap(nn.Linear(8, 6), Spec(2, 4.0, dora=True))
    assert sum_of(dora, "weight", dora.base_weight("weight")) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_some_places_are_those_of_the_whole(axis):
    layer = of("linear", torch.float64)
    with torch.no_grad():
        total = sum_of(layer, "weight", layer.base_weight("weight"))
        places = torch.tensor([0, 5, 20])
        torch.testing.assert_close(
            total.at(places, axis).whole(), total.whole().index_select(axis, places)
        )


def test_surely_finite_is_never_said_of_what_is_not():
    left, right = torch.ones(3, 1), torch.ones(1, 4)
    assert Sum(torch.ones(3, 4), left, right).surely_finite()
    for bad in (float("nan"), float("inf"), -float("inf")):
        stored = torch.ones(3, 4)
        stored[1, 2] = bad
        assert not Sum(stored, left, right).surely_finite()
        assert not Sum(torch.ones(3, 4), left * bad, right).surely_finite()
    assert not Sum(torch.full((3, 4), 65000.0).half(), left * 600, right).surely_finite()


@pytest.mark.parametrize("size", [1, 200, 2**19])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [RUN, 150])
def test_sums_are_of_what_was_written_and_the_same_when_it_is_read_again(columns, dtype, size):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    left, right = torch.randn(7, 3, dtype=wide), torch.randn(3, columns, dtype=wide)
    total = Sum(torch.randn(7, columns).to(dtype), left, right)
    runs, again = Runs.of(total), Runs.of(total)
    weight = total.through(torch.empty_like(total.stored), runs, size=size)
    assert torch.equal(weight, total.whole(size))
    total.through(weight, again, write=False, size=size)
    signs = runs.signs.double().numpy()
    assert set(signs) == {-1.0, 1.0}
    for tensor, found in ((total.stored, runs.base), (weight, runs.merged)):
        padded = np.pad(tensor.double().numpy(), ((0, 0), (0, -columns % RUN)))
        cut = padded.reshape(7, -1, RUN)
        np.testing.assert_allclose(found.numpy(), cut @ signs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(runs.size.numpy(), np.linalg.norm(cut, axis=-1), rtol=1e-5)
    for name in ("base", "merged", "size"):
        assert torch.equal(getattr(runs, name), getattr(again, name))


def test_a_weight_that_is_computed_when_read_is_not_held():
    layer = of("linear", torch.float32)
    with torch.no_grad():
        assert held(streamed(layer), "weight") is None
        assert torch.equal(held(plain(layer), "weight"), streamed(layer).weight)


def test_rows_are_widened_into_the_buffer_only_where_they_are_short():
    buffer, rows = torch.empty(4, 3), torch.ones(2, 3)
    assert widened(rows, buffer) is rows
    assert widened(rows.bfloat16(), buffer).data_ptr() == buffer.data_ptr()


# --- memory that was given up --------------------------------------------------------------------


def adapted(first: nn.Parameter | None = None) -> nn.Sequential:
    """Two layers of one size and one of another, all adapted; the first weight may be given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 48), nn.Linear(48, 4))
    if first is not None:
        model[0].weight = first
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=[r"\d"]))
    for layer in lora_layers(model).values():
        layer.update.lora_B.data.normal_()
    return model


def test_a_merge_for_good_writes_into_memory_that_it_has_given_up():
    model = adapted()
    old = [layer.base_layer.weight.data_ptr() for layer in lora_layers(model).values()]
    expected = [layer.weight.detach().clone() for layer in lora_layers(model).values()]
    rankwise.merge(model, keep=False)
    assert model[1].weight.data_ptr() == old[0]
    for layer, weight in zip(model, expected, strict=True):
        torch.testing.assert_close(layer.weight, weight)


HOLDERS = {
    "parameter": lambda w: w,
    "data": lambda w: w.data,
    "view": lambda w: w.detach()[3:, 1:],
    "array": lambda w: w.detach().numpy(),
    "array of a view": lambda w: w.detach()[5].numpy(),
    "dlpack": lambda w: np.from_dlpack(w.detach()),
    "storage": lambda w: w.untyped_storage(),
    "graph": lambda w: ((x := torch.ones(48, requires_grad=True)), (x @ w.mT).sum()),
    "lazy clone": lambda w: torch._lazy_clone(w.detach()),
}


def seen(held) -> np.ndarray:
    """A copy of the numbers that somebody who holds this sees now."""
    if isinstance(held, torch.UntypedStorage):
        return np.array(held.tolist())
    if isinstance(held, tuple):
        x, y = held
        return torch.autograd.grad(y, x, retain_graph=True)[0].numpy()
    return held.detach().clone().numpy() if isinstance(held, torch.Tensor) else held.copy()


@pytest.mark.parametrize("kind", list(HOLDERS))
def test_numbers_that_somebody_holds_stay_what_they_were(kind):
    model = adapted()
    held = HOLDERS[kind](lora_layers(model)["0"].base_layer.weight)
    before = seen(held)
    rankwise.merge(model, keep=False)
    assert np.array_equal(seen(held), before)


def test_a_state_dict_that_was_taken_before_stays_what_it_was():
    model = adapted()
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    rankwise.merge(model, keep=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_a_weight_that_another_module_has_too_stays_what_it_was():
    other = nn.Linear(48, 32)
    before = other.weight.detach().clone()
    rankwise.merge(adapted(other.weight), keep=False)
    assert torch.equal(other.weight, before)


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def test_memory_that_others_may_see_is_not_written(tmp_path):
    array, file = np.random.default_rng(0).random((32, 48), np.float32), tmp_path / "weight"
    before = array.copy()
    array.tofile(file)
    ways = {
        "array": lambda: torch.from_numpy(array),
        "file": lambda: torch.from_file(str(file), shared=True, size=array.size).view(32, 48),
        "shared": lambda: torch.from_numpy(array).clone().share_memory_(),
    }
    for kind, way in ways.items():
        model = adapted(frozen(way()))
        place = lora_layers(model)["0"].base_layer.weight.data_ptr()
        rankwise.merge(model, keep=False)
        assert model[1].weight.data_ptr() != place, kind
    assert np.array_equal(array, before)
    assert np.array_equal(np.fromfile(file, np.float32).reshape(32, 48), before)


def test_spares_are_of_the_size_and_are_held_while_they_are_wanted():
    stored, other = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.float64)
    spares, mine = Spares([stored, stored, other]), torch.zeros(4, 3)
    for refused in (mine.detach(), torch.zeros(5, 3), torch.zeros(8, 3)[:4].detach()):
        spares.give(refused)
        assert not spares.held
    spares.give(torch.zeros(4, 3))
    place = spares.held[torch.float32, 12].data_ptr()
    assert spares.take(other).data_ptr() != place
    first = spares.take(stored)
    assert (first.data_ptr(), first.shape, spares.held) == (place, (3, 4), {})
    spares.take(stored)
    spares.give(torch.zeros(4, 3))
    assert not spares.held
