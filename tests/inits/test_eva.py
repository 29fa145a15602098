"""EVA against numpy's principal components of the inputs, and against PEFT's own."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.inits import EVA, Place
from rankwise.inits.eva import attention_mask
from rankwise.lowrank import Factors

PlaceOf = Callable[..., Place]
StateOf = Callable[[nn.Module], Callable[[], None]]
Batches = list[dict[str, Tensor]]
NAMES = ("q", "k", "v", "fused", "head")


def places(model: nn.Module, place_of: PlaceOf, names: Sequence[str] = NAMES) -> list[Place]:
    return [place_of(model.get_submodule(n), r=2 if n == "head" else 4, name=n) for n in names]


def inputs(model: nn.Module, name: str, batches: Batches, masked: bool = True) -> np.ndarray:
    """All rows that reach a layer, without padding, as numpy sees them."""
    rows: list[Tensor] = []
    mode = {m: m.training for m in model.modules()}
    model.eval()
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: rows.append(a[0]))
    found: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            x = rows.pop()
            keep = batch["attention_mask"].bool() if masked and x.ndim == 3 else ...
            found.append(x[keep].reshape(-1, x.shape[-1]))
    handle.remove()
    for module, training in mode.items():
        module.training = training
    return torch.cat(found).double().numpy()


def components(rows: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
    """The first r principal components, and the share of the variance of each."""
    _, sigma, vh = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return vh[:r], sigma**2 / (sigma**2).sum()


@pytest.mark.parametrize("masked", [True, False])
def test_a_is_the_principal_components_and_b_zero(
    net: nn.Module, batches: Batches, place_of: PlaceOf, masked: bool
):
    mask = {} if masked else {"mask": lambda batch: None}
    chosen = places(net, place_of)
    starts = EVA(batches, **mask).fit(net, chosen)
    assert list(starts) == list(NAMES)
    for place in chosen:
        start = starts[place.name]
        expected, _ = components(inputs(net, place.name, batches, masked), place.r)
        cosines = np.abs((start.A.numpy() * expected).sum(1))
        assert cosines.min() > 0.9999
        assert start.A.shape == (place.r, place.in_features)
        assert start.B.shape == (place.out_features, place.r)
        assert start.A.is_contiguous()
        assert not start.subtract
        assert not Factors(start.A, start.B, 2.0).delta().any()


def test_the_model_is_left_as_it_was(
    net: nn.Module, batches: Batches, place_of: PlaceOf, state_of: StateOf
):
    check = state_of(net)
    first = EVA(batches).fit(net, places(net, place_of))
    check()
    torch.rand(5)  # another state of the random numbers makes no difference
    second = EVA(iter(batches)).fit(net, places(net, place_of))
    for name, start in first.items():
        assert torch.equal(start.A, second[name].A)


def test_it_is_left_as_it_was_after_an_error(
    net: nn.Module, batches: Batches, place_of: PlaceOf, state_of: StateOf
):
    check = state_of(net)
    with pytest.raises(IndexError):
        EVA([*batches, {"input_ids": torch.tensor([[99]])}]).fit(net, places(net, place_of))
    check()


def test_it_is_pefts(net: nn.Module, batches: Batches, place_of: PlaceOf):
    import peft
    from peft.tuners.lora.eva import get_eva_state_dict

    batch = {k: v for k, v in batches[2].items() if k != "labels"}
    names = NAMES[:4]  # the head's inputs are no tokens, and PEFT asks for a mask that fits
    config = peft.LoraConfig(
        r=4,
        target_modules=list(names),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
    )
    theirs = get_eva_state_dict(net, [batch], config, show_progress_bar=False)
    starts = EVA([batch]).fit(net, places(net, place_of, names))
    for name in names:
        cosines = (starts[name].A * theirs[name]).sum(1).abs()
        assert cosines.min() > 0.999


def test_shared_ranks_are_pefts(net: nn.Module, batches: Batches, place_of: PlaceOf):
    import peft
    from peft.tuners.lora.eva import get_eva_state_dict

    batch = {k: v for k, v in batches[2].items() if k != "labels"}
    names = ("q", "fused")  # not on one input: there PEFT gives equal shares to the last layer
    with torch.no_grad():  # an input that varies in few directions
        net.embed.weight[:, 3:] *= 0.1
    config = peft.LoraConfig(
        r=4,
        target_modules=list(names),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0),
    )
    theirs = get_eva_state_dict(net, [batch], config, show_progress_bar=False)
    starts = EVA([batch], rho=2).fit(net, places(net, place_of, names))
    assert {n: len(s.A) for n, s in starts.items()} == {n: len(a) for n, a in theirs.items()}


def test_ranks_go_where_the_variance_is(net: nn.Module, batches: Batches, place_of: PlaceOf):
    chosen = places(net, place_of, ("q", "v", "fused", "head"))
    starts = EVA(batches, rho=3).fit(net, chosen)
    shares = {p.name: components(inputs(net, p.name, batches), 0)[1] for p in chosen}
    offers = sorted(
        (
            (share, p.name)
            for p in chosen
            for share in shares[p.name][: min(3 * p.r, p.out_features)]
        ),
        key=lambda offer: -offer[0],
    )
    taken = [name for _, name in offers[: sum(p.r for p in chosen)]]
    assert {n: len(s.A) for n, s in starts.items()} == {
        n: taken.count(n) for n in dict.fromkeys(taken)
    }
    for name, start in starts.items():
        assert start.B.shape[1] == start.A.shape[0]
        assert name in taken


def test_a_layer_without_a_share_is_left_out(place_of: PlaceOf):
    model = nn.Sequential(nn.Linear(9, 40), nn.Linear(40, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.outer(torch.ones(40), torch.ones(9)))  # one direction comes out
    rows = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    chosen = [place_of(model[0], r=1, name="0"), place_of(model[1], r=1, name="1")]
    starts = EVA([rows * torch.tensor([1.0, 1, *[0.9] * 7])], rho=2).fit(model, chosen)
    assert {name: len(start.A) for name, start in starts.items()} == {"1": 1, "0": 1}
    model[0].weight.data[:20] = 3.0 * torch.eye(9)[0]  # and now two, which together explain all
    starts = EVA([rows], rho=2).fit(model, chosen)
    assert {name: len(start.A) for name, start in starts.items()} == {"1": 2}


def test_parts_of_a_fused_projection_and_layers_on_one_input_start_alike(
    net: nn.Module, batches: Batches, place_of: PlaceOf
):
    chosen = [
        *places(net, place_of, ("q", "k")),
        place_of(net.fused, name="fused.a", rows=slice(0, 12)),
        place_of(net.fused, name="fused.b", rows=tuple(range(12, 24))),
    ]
    starts = EVA(batches).fit(net, chosen)
    assert torch.equal(starts["q"].A, starts["k"].A)
    assert torch.equal(starts["fused.a"].A, starts["fused.b"].A)
    assert starts["fused.b"].B.shape == (12, 4)


def test_an_input_changed_in_place_is_another_input(place_of: PlaceOf):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            first = self.a(x)
            x[:, 0] *= 100
            return first + self.b(x)

    model = Twice()
    chosen = [place_of(model.a, r=1, name="a"), place_of(model.b, r=1, name="b")]
    starts = EVA([torch.randn(30, 6)]).fit(model, chosen)
    assert starts["b"].A[0, 0] > 0.99
    assert abs(float(starts["a"].A[0, 0])) < 0.99


def test_a_convolution_is_seen_through_its_patches(place_of: PlaceOf):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    x = torch.randn(5, 4, 8, 8)
    starts = EVA([x]).fit(conv, [place_of(conv, r=3)])
    by_group = nn.functional.unfold(x, 3, padding=1, stride=2).mT.reshape(-1, 2, 18)
    expected, _ = components(by_group.reshape(-1, 18).double().numpy(), 3)
    assert np.abs((starts["layer"].A.numpy() * expected).sum(1)).min() > 0.9999


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fast_path_of_an_encoder_hides_nothing(place_of: PlaceOf, norm_first: bool):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model.requires_grad_(False)
    chosen = [place_of(model.layers[1].linear1, name="layers.1.linear1")]
    starts = EVA([torch.randn(9, 5, 16)]).fit(model, chosen)
    assert starts["layers.1.linear1"].A.shape == (4, 16)


def test_the_default_mask_is_the_batchs():
    mask = torch.ones(2, 3)
    assert attention_mask({"attention_mask": mask}) is mask
    assert attention_mask({"attention_mask": torch.ones(2, 1, 3, 3)}) is None
    assert attention_mask({"input_ids": mask}) is None
    assert attention_mask((mask,)) is None


def test_how_a_batch_is_run_can_be_said(place_of: PlaceOf):
    layer = nn.Linear(6, 3)
    rows = torch.randn(20, 6)
    forward: Any = lambda model, batch: model(batch["rows"])  # noqa: E731
    starts = EVA([{"rows": rows}], forward=forward).fit(layer, [place_of(layer, r=2)])
    expected, _ = components(rows.double().numpy(), 2)
    assert np.abs((starts["layer"].A.numpy() * expected).sum(1)).min() > 0.9999


def test_what_cannot_be_started_is_named_at_once(
    net: nn.Module, batches: Batches, place_of: PlaceOf, bank_of: PlaceOf
):
    chosen = [
        place_of(net.embed, name="embed"),
        bank_of(torch.zeros(2, 8, 8)),
        place_of(nn.Bilinear(4, 5, 6), name="pair"),
        place_of(net.q, r=17, name="q"),
    ]
    with pytest.raises(UserError, match="EVA cannot start") as caught:
        EVA(batches).fit(net, chosen)
    said = str(caught.value)
    assert "'embed': an embedding's inputs are row numbers" in said
    assert "'experts.gate_up_proj': it is one of a bank" in said
    assert "'pair': Bilinear reads its weights itself" in said
    assert "'q': r = 17 is more than its 16 inputs" in said


def test_batches_that_show_too_little_are_refused(
    net: nn.Module, batches: Batches, place_of: PlaceOf
):
    q = places(net, place_of, ("q",))
    with pytest.raises(UserError, match="EVA was given no batches"):
        EVA([]).fit(net, q)
    with pytest.raises(UserError, match=r"'q': the 2 rows .* vary in 1 directions, and r = 4"):
        EVA([{"input_ids": torch.tensor([[1, 2]])}]).fit(net, q)
    nothing = {**batches[0], "attention_mask": torch.zeros(12, 6)}
    with pytest.raises(UserError, match="EVA: batch 1 brings no row to 'q'"):
        EVA([batches[0], nothing]).fit(net, q)
    with pytest.raises(UserError, match=r"EVA never saw an input of 'q', 'k': the model did not"):
        EVA([torch.ones(3, 2)]).fit(nn.Linear(2, 2), places(net, place_of, ("q", "k")))
    with torch.no_grad():
        net.embed.weight[7] = torch.nan
    with pytest.raises(UserError, match="EVA: in batch 1 the input of 'q' is not finite"):
        EVA([{"input_ids": torch.arange(1, 7)[None]}, {"input_ids": torch.tensor([[7]])}]).fit(
            net, q
        )


@pytest.mark.parametrize("rho", [0.5, float("nan"), float("inf"), "2", True])
def test_rho_is_a_number_of_one_or_more(rho: Any):
    with pytest.raises(UserError, match="EVA: rho must be a finite number of 1 or more"):
        EVA([], rho=rho)
