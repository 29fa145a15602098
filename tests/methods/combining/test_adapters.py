"""Combined adapters on models: outputs are the base's with Σ w_i δ_i, written in by hand."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import UserError
from rankwise.inits import PiSSA
from rankwise.lowrank import Factors
from rankwise.methods.adapter import Adapter
from rankwise.methods.combining import (
    DARE,
    SVD,
    TIES,
    Combination,
    Concatenate,
    Magnitude,
    combine,
)

IDS = torch.tensor([[1, 2, 3, 8], [0, 1, 5, 5]])
Make = Callable[..., Adapter]


def dense(factors: Factors) -> np.ndarray:
    """δ = s (B A − B0 A0) by numpy alone."""
    A, B = factors.A.double().numpy(), factors.B.double().numpy()
    grown = B @ A
    if factors.A0 is not None and factors.B0 is not None:
        grown = grown - factors.B0.double().numpy() @ factors.A0.double().numpy()
    return factors.scale * grown


def by_hand(model: nn.Module, adapters: Sequence[Adapter], weights: Sequence[float]) -> nn.Module:
    """A copy of the base whose own parameters have got every Σ w_i of the adapters."""
    changed = copy.deepcopy(model)
    values = dict(changed.named_parameters())
    with torch.no_grad():
        for weight, adapter in zip(weights, adapters, strict=True):
            for name, factors in adapter.factors.items():
                delta = weight * torch.from_numpy(dense(factors))
                if name == "tokens":
                    values["tokens.weight"] += delta.T
                elif name == "experts.up":
                    values[name] += delta
                elif name.startswith("fused."):
                    rows = slice(0, 6) if name.endswith("left") else slice(6, 12)
                    values["fused.weight"][rows] += delta
                else:
                    values[f"{name}.weight"] += delta
            for name, change in adapter.biases.items():
                values[name] += weight * change
            for name, rows in adapter.tokens.items():
                for token, change in zip(rows.ids, rows.delta, strict=True):
                    values[f"{name}.weight"][token] += weight * change
    return changed


def with_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    changed = copy.deepcopy(model)
    rw.attach(changed, adapter)
    return changed.eval()


# --- outputs -------------------------------------------------------------------------------------


def test_a_combination_of_every_kind_of_weight_is_the_base_plus_the_weighted_sum(model, make: Make):
    adapters = [
        make("tokens", "^body$", "fused.left", "experts.up", r=2),
        make("^body$", "inner.body", "fused.right", "experts.up", r=3, alpha=1),
        make("tokens", "^body$", r=1, rank_stabilized=True, init=PiSSA()),
    ]
    weights = (0.7, -1.3, 2.0)
    expected = by_hand(model, adapters, weights)(IDS)
    combined = combine(adapters, weights)
    torch.testing.assert_close(with_adapter(model, combined.adapter)(IDS), expected)
    assert set(combined.errors) == {n for a in adapters for n in a.factors}
    assert combined.error < 1e-14
    assert combined.shift == combined.error
    ranks = {name: factors.r for name, factors in combined.adapter.factors.items()}
    assert ranks == {
        "tokens": 2 + 2 * 1,  # the start of the third counts
        "body": 6,  # 2 + 3 + 2, which is more than the weight has
        "fused.left": 2,
        "experts.up": 5,
        "inner.body": 3,
        "fused.right": 3,
    }


@pytest.mark.parametrize(
    "how", [Concatenate(), SVD(2), TIES(0.5), DARE(0.5, seed=1), Magnitude(0.5)], ids=type
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_combination_passes_the_merge_certificate(
    model, make: Make, how: Combination, dtype: torch.dtype
):
    adapters = [make("tokens", "^body$", "fused.left"), make("^body$", "inner.body", r=3)]
    tuned = with_adapter(
        copy.deepcopy(model).to(dtype), combine(adapters, (0.7, -1.3), how).adapter
    )
    before = tuned(IDS)
    certificate = rw.merge(tuned)
    assert certificate.passed, str(certificate)
    assert len(certificate.layers) == 4
    coarse = dtype == torch.bfloat16
    torch.testing.assert_close(tuned(IDS), before, atol=0.3 if coarse else 1e-4, rtol=0.05)


def test_weights_are_one_when_not_given_as_when_both_adapters_act(model, make: Make):
    one, two = make("^body$", "tokens"), make("^body$", "fused", r=3)
    rw.attach(model, one, name="one")
    rw.attach(model, two, name="two")
    together = model(IDS)
    rw.detach(model)
    combined = combine([one, two])
    torch.testing.assert_close(with_adapter(model, combined.adapter)(IDS), together)


def test_biases_and_token_rows_add_up_with_their_weights(model, make: Make):
    adapters = [
        make("^body$", bias="adapted", trainable_tokens={"tokens": [1, 8]}),
        make("^body$", "fused", bias="adapted", trainable_tokens={"tokens": [5, 1]}),
        make("tokens"),
    ]
    weights = (0.5, -2.0, 1.0)
    adapter = combine(adapters, weights).adapter
    expected = by_hand(model, adapters, weights)(IDS)
    torch.testing.assert_close(with_adapter(model, adapter)(IDS), expected)
    assert set(adapter.biases) == {"body.bias", "fused.bias"}
    assert adapter.tokens["tokens"].ids == (1, 8, 5)


def test_a_task_taken_away_leaves_the_others(make: Make):
    one, two = make("^body$", r=2), make("^body$", r=1)
    both = combine([one, two]).adapter
    left = combine([both, two], [1.0, -1.0], SVD(r=2))
    np.testing.assert_allclose(dense(left.adapter.factors["body"]), dense(one.factors["body"]))
    assert left.error < 1e-12


def test_one_adapter_is_scaled_or_cut(make: Make):
    one = make("^body$", "tokens", r=4)
    half = combine([one], [0.5])
    np.testing.assert_allclose(
        dense(half.adapter.factors["body"]), 0.5 * dense(one.factors["body"])
    )
    short = combine([one], how=SVD(r=1))
    for name, factors in one.factors.items():
        sigma = np.linalg.svd(dense(factors), compute_uv=False)
        expected = math.sqrt((sigma[1:] ** 2).sum() / (sigma**2).sum())
        assert short.errors[name] == pytest.approx(expected)
    deltas = [(dense(f), dense(short.adapter.factors[n])) for n, f in one.factors.items()]
    lost = math.hypot(*(np.linalg.norm(w - d).item() for w, d in deltas))
    assert short.error == pytest.approx(lost / math.hypot(*(np.linalg.norm(w) for w, _ in deltas)))


def test_an_adapter_of_weight_zero_gives_nothing(make: Make):
    one, two = make("^body$", bias="adapted"), make("^body$", "tokens", r=5)
    combined = combine([one, two], [2.0, 0.0])
    assert set(combined.adapter.factors) == {"body"}
    assert combined.adapter.factors["body"].r == 2
    assert torch.equal(combined.adapter.biases["body.bias"], 2 * one.biases["body.bias"])


@pytest.mark.parametrize("how", [TIES(0.3, 2), DARE(0.5, r=2), Magnitude(0.3, 2)])
def test_dropping_entries_tells_what_the_cut_lost_and_how_far_the_sum_is(model, make: Make, how):
    adapters = [make("^body$", "tokens", "experts.up"), make("^body$", "experts.up", r=3)]
    combined = combine(adapters, [1.0, 0.5], how)
    assert 0 < combined.error < 1
    assert with_adapter(model, combined.adapter)(IDS).isfinite().all()
    for name, gap in combined.shifts.items():
        parts = [(w, a.factors.get(name)) for w, a in zip((1.0, 0.5), adapters, strict=True)]
        plain = sum(w * dense(f) for w, f in parts if f is not None)
        far = np.linalg.norm(plain - dense(combined.adapter.factors[name]))
        assert gap.error == pytest.approx(far / np.linalg.norm(plain))


# --- the method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [Concatenate(), SVD(energy=0.8), TIES(0.5)])
def test_the_method_says_rank_and_scale_of_every_name(make: Make, how):
    adapters = [make("tokens", "body", "experts.up", r=3), make("^body$", r=2, init=PiSSA())]
    adapter = combine(adapters, how=how).adapter
    for name, factors in adapter.factors.items():
        spec = adapter.method.spec(name)
        assert (spec.r, spec.scale) == (factors.r, pytest.approx(factors.scale))


def test_the_method_by_itself_means_the_same_weights_modules_biases_and_rows(model, make: Make):
    options: dict[str, Any] = {"bias": "adapted", "trainable_tokens": {"tokens": [2]}}
    one = make("^body$", "fused.left", modules_to_save=["head"], **options)
    adapter = combine([one, make("experts.up")]).adapter
    fresh, loaded = copy.deepcopy(model), copy.deepcopy(model)
    asked = rw.attach(fresh, adapter.method)
    given = rw.attach(loaded, adapter)
    assert set(asked.adapted) == set(given.adapted) == {"body", "fused.left", "experts.up"}
    again, taken = rw.adapter_of(fresh), rw.adapter_of(loaded)
    assert again.modules == taken.modules == ("head",)
    assert again.biases.keys() == taken.biases.keys() == {"body.bias", "fused.bias"}
    assert again.tokens["tokens"].ids == taken.tokens["tokens"].ids == (2,)
    assert all(torch.equal(taken.factors[n].B, f.B) for n, f in adapter.factors.items())


def test_the_method_names_modules_trained_whole_exactly(model, make: Make):
    adapter = combine([make("fused", modules_to_save=["^body$"])]).adapter
    rw.attach(model, adapter.method)
    assert rw.adapter_of(model).modules == ("body",)


# --- modules trained whole -----------------------------------------------------------------------


def test_the_one_head_there_is_stays_and_so_do_equal_ones(make: Make):
    with_head = make("^body$", head="train")
    for others in ([make("^body$")], [with_head, make("tokens")]):
        adapter = combine([*others, with_head], [0.3] * (len(others) + 1)).adapter
        assert adapter.modules == ("head",)
        assert torch.equal(adapter.trained["head.weight"], with_head.trained["head.weight"])


def test_of_different_heads_the_named_adapters_are_kept(model, make: Make):
    one = make("^body$", head="train", modules_to_save=["norm"])
    two = make("^body$", head="train")
    with pytest.raises(UserError) as caught:
        combine([one, two])
    assert "'head' was trained whole in adapters[0] and in adapters[1]" in str(caught.value)
    assert "by head whose modules are kept: adapters[0] or adapters[1]" in str(caught.value)
    for kept, adapter in enumerate((one, two)):
        combined = combine([one, two], head=kept).adapter
        assert combined.modules == adapter.modules
        assert combined.trained.keys() == adapter.trained.keys()
        expected = by_hand(model, [one, two], (1, 1))
        expected.load_state_dict(adapter.trained, strict=False)
        torch.testing.assert_close(with_adapter(model, combined)(IDS), expected(IDS))


def test_different_modules_are_all_kept(make: Make):
    adapter = combine(
        [make("^body$", modules_to_save=["norm"]), make("^body$", head="train")]
    ).adapter
    assert set(adapter.modules) == {"norm", "head"}
    assert set(adapter.trained) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([1.0], "there are 1 weights for 2 adapters"),
        ([0.0, 0.0], "all are 0"),
        ([1.0, math.nan], "nan is not a finite number"),
        ([math.inf, 1.0], "inf is not a finite number"),
        ([True, 1.0], "True is not a finite number"),
        (["1", 1.0], "'1' is not a finite number"),
    ],
)
def test_weights_that_are_none_are_refused(make: Make, weights, told: str):
    one = make("^body$")
    with pytest.raises(UserError, match="weights") as caught:
        combine([one, one], weights)
    assert told in str(caught.value)


def test_nothing_to_combine_is_refused():
    with pytest.raises(UserError, match="no adapter to combine"):
        combine([])


# --- PEFT ----------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(20, 16)
        self.tokens = nn.Embedding(30, 16)
        self.grid = nn.Conv2d(4, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.fixture
def theirs() -> Any:
    """A model with two adapters of PEFT, of different ranks and scales."""
    peft = pytest.importorskip("peft")
    names = ["body", "tokens", "grid"]
    found = peft.get_peft_model(Layers(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=names))
    found.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=6, target_modules=names))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return found


def taken(theirs: Any, name: str) -> Adapter:
    """An adapter of PEFT's model as the neutral value."""
    factors: dict[str, Factors] = {}
    for place, module in theirs.base_model.model.named_children():
        pair = (
            (module.lora_embedding_A[name], module.lora_embedding_B[name])
            if place == "tokens"
            else (module.lora_A[name].weight, module.lora_B[name].weight)
        )
        A, B = (t.detach().clone() for t in pair)
        factors[place] = Factors(A.flatten(1), B.flatten(1), module.scaling[name])
    config = theirs.peft_config[name]
    method = rw.LoRA(r=config.r, alpha=config.lora_alpha, target_modules=tuple(factors))
    return Adapter(method, factors)


def peft_delta(theirs: Any, place: str, name: str) -> np.ndarray:
    delta = getattr(theirs.base_model.model, place).get_delta_weight(name).detach()
    return (delta.T if place == "tokens" else delta.flatten(1)).numpy()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -2.0)])
def test_concatenation_and_svd_are_pefts_cat_and_svd(theirs: Any, weights: tuple[float, float]):
    adapters = [taken(theirs, "default"), taken(theirs, "other")]
    names = ["default", "other"]
    theirs.add_weighted_adapter(names, list(weights), "cat", combination_type="cat")
    theirs.add_weighted_adapter(names, list(weights), "svd", combination_type="svd", svd_rank=2)
    exact, short = combine(adapters, weights), combine(adapters, weights, SVD(r=2))
    for place in ("body", "tokens", "grid"):
        wanted = peft_delta(theirs, place, "cat")
        close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(wanted).max()}
        np.testing.assert_allclose(dense(exact.adapter.factors[place]), wanted, **close)
        cut = peft_delta(theirs, place, "svd")
        np.testing.assert_allclose(dense(short.adapter.factors[place]), cut, **close)
        lost = np.linalg.norm(wanted - cut) / np.linalg.norm(wanted)
        assert short.errors[place] == pytest.approx(lost, rel=1e-4)


def test_pefts_linear_is_no_combination_of_the_updates(theirs: Any):
    import peft

    theirs.add_adapter("third", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["body"]))
    with torch.no_grad():
        theirs.base_model.model.body.lora_B["third"].weight.normal_()
    names = ["default", "third"]
    theirs.add_weighted_adapter(names, [1.0, 1.0], "linear", combination_type="linear")
    wanted = sum(peft_delta(theirs, "body", name) for name in names)
    lost = np.linalg.norm(wanted - peft_delta(theirs, "body", "linear"))
    assert lost / np.linalg.norm(wanted) > 0.7
