"""Large weights: honest merges pass, and a fault outside the sample is found or never written."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise.attaching import lora_layers
from rankwise.layers import Spec, wrap
from rankwise.merging import MergeError, fold, merge, unmerge
from rankwise.merging import sample as module
from rankwise.merging.blocks import Sum
from rankwise.merging.fold import plain, streamed
from rankwise.merging.rounding import check_layer

KINDS = {
    "linear": lambda n, m: nn.Linear(n, m),
    "conv": lambda n, m: Conv1D(m, n),
    "embedding": lambda n, m: nn.Embedding(n, m),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layer_of(kind, n, m, dtype, size=0.1, r=4, seed=0):
    torch.manual_seed(seed)
    layer = wrap(KINDS[kind](n, m).to(dtype), Spec(r, 8.0))
    grown = layer.update.lora_A if kind == "embedding" else layer.update.lora_B
    grown.data.normal_(std=size)
    return layer


@pytest.fixture
def model():
    """Two large layers and a small one, each with an update worth a tenth of its weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 600), nn.ReLU(), nn.Linear(600, 530), nn.Linear(530, 4))
    rankwise.attach(model, rankwise.LoRA(r=4, target_modules=[r"\d"]))
    for layer in lora_layers(model).values():
        layer.update.lora_B.data.normal_(std=0.1)
    return model.eval()


# --- honest merges -------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 300),
    m=st.integers(1, 300),
    r=st.integers(1, 12),
    power=st.integers(-6, 1),
    seed=st.integers(0, 2**16),
)
def test_an_honest_merge_is_never_refused(kind, dtype, n, m, r, power, seed):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "LARGE", 0)
        layer = layer_of(kind, n, m, dtype, 10.0**power, r, seed)
        for twin in (plain(layer), streamed(layer)):
            check = check_layer("x", layer, "weight", twin, None)
            assert check.problem() is None
            assert check.lost <= 1.0001
        assert check.of == (n if kind == "embedding" else m)
        writing = module.Writing()
        plain(layer, "x", writing)
    assert 0 <= writing.sums["x"] <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_sample_measures_what_all_rows_would(kind, dtype):
    layer = layer_of(kind, 700, 600, dtype)
    with torch.no_grad():
        check = check_layer("x", layer, "weight", plain(layer), None)
        delta = layer.update.factors().delta().double().norm()
    assert check.rows < check.of
    assert 0 <= check.weight_ratio <= 1
    assert 0 < check.sums <= 1
    assert 0 <= check.ratio <= 1
    assert check.update == pytest.approx(float(delta), rel=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_the_certificate_says_what_was_looked_at(model, keep):
    x = torch.randn(3, 500)
    with torch.no_grad():
        unmerged = model(x)
        certificate = merge(model, keep=keep, probe=x)
        torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-5)
    first, second, small = certificate.layers
    assert (first.rows, first.of) == (module.ROWS, 600)
    assert (second.rows, second.of) == (module.ROWS, 530)
    assert (small.rows, small.of, small.sums) == (4, 4, 0.0)
    assert 0 < first.sums <= 1
    assert certificate.to_json()["layers"][0].items() >= {"rows": module.ROWS, "of": 600}.items()
    assert "2 large weight(s) checked in some rows, and in sums throughout" in certificate.line()


def test_ids_that_a_probe_looks_up_are_in_the_sample():
    layer = layer_of("embedding", 5000, 64, torch.float32)
    ids = torch.tensor([17, 4321])
    with torch.no_grad():
        found = module.sampled(layer, "weight", plain(layer), ids)
    assert {0, 17, 4321, 4999} <= set(found.places.tolist())


@pytest.mark.parametrize("keep", [True, False])
def test_each_merged_weight_is_computed_once(model, keep, monkeypatch):
    made = []
    honest = fold.merged_weight

    def counted(layer, parameter, *rest):
        made.append(tuple(layer.base_weight(parameter).shape))
        return honest(layer, parameter, *rest)

    monkeypatch.setattr(fold, "merged_weight", counted)
    merge(model, keep=keep)
    assert made.count((600, 500)) == made.count((530, 600)) == 1


# --- faults --------------------------------------------------------------------------------------


def spoil(monkeypatch, *places):
    """Leave W0 in some places of every large weight when it is written."""
    honest = Sum.put

    def wrong(self, there, wide, left):
        before = wide.clone()
        honest(self, there, wide, left)
        if self.stored.numel() > module.LARGE:
            there[places] = before[places].to(there.dtype)

    monkeypatch.setattr(Sum, "put", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "places", [(slice(10, 20),), (slice(11, 12),), (slice(30, 40), slice(64, 128))], ids=str
)
def test_a_wrong_block_outside_the_sample_is_found(model, monkeypatch, places, dtype):
    model.to(dtype)
    before = dict(model.named_modules())
    spoil(monkeypatch, *places)
    with pytest.raises(MergeError, match=r"of 0 is not W0 \+ δ rounded once \(a sum over a few"):
        merge(model)
    assert dict(model.named_modules()) == before
    monkeypatch.undo()
    assert merge(model).passed
    unmerge(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_block_is_never_written(model, monkeypatch, dtype):
    model.to(dtype)
    exact = {}
    for name, layer in lora_layers(model).items():
        A, B = (f.detach().double() for f in (layer.update.lora_A, layer.update.lora_B))
        exact[name] = (layer.base_weight("weight").double() + layer.update.scale * B @ A).numpy()
    spoil(monkeypatch, slice(10, 20))
    certificate = merge(model, keep=False)
    assert certificate.passed
    assert all(0 < layer.sums <= 1 for layer in certificate.layers[:2])
    for name in ("0", "2"):
        found = model.get_submodule(name).weight.detach().double().numpy()
        allowed = torch.finfo(dtype).eps / 2 * np.abs(exact[name]) + 1e-7
        assert (np.abs(found - exact[name]) <= allowed).all()


@pytest.mark.parametrize("keep", [True, False])
def test_a_wrong_scale_is_found_in_the_sample_and_changes_nothing(model, keep, monkeypatch):
    before, x = dict(model.named_modules()), torch.randn(2, 500)
    with torch.no_grad():
        unmerged = model(x)
    honest = Sum.put
    monkeypatch.setattr(
        Sum, "put", lambda self, there, wide, left: honest(self, there, wide, left * 1.001)
    )
    with pytest.raises(MergeError, match=r"of 0 is not W0 \+ δ rounded once \(an element"):
        merge(model, keep=keep)
    assert dict(model.named_modules()) == before
    with torch.no_grad():
        assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_outside_the_sample_that_is_not_finite_is_found(model, keep, bad):
    lora_layers(model)["0"].base_layer.weight.data[11, 7] = bad
    before = dict(model.named_modules())
    with pytest.raises(MergeError, match="weight of 0 is not finite"):
        merge(model, keep=keep)
    assert dict(model.named_modules()) == before


def test_a_wrong_bias_is_found_in_the_sampled_outputs(model):
    layer = lora_layers(model)["0"]
    wrong = plain(layer)
    wrong.bias = nn.Parameter(wrong.bias + 1e-2)
    with torch.no_grad():
        check = check_layer("x", layer, "weight", wrong, None)
    assert check.weight_ratio <= 1 < check.ratio
