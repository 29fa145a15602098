"""The dropout of a model by seed: what it does, where it is torch's own, and the way back."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise as rw
from rankwise.layers import dropping
from rankwise.layers.dropping import BySeed, drop_as_torch, drop_by_seed

P = 0.375  # a whole number of steps of 1 / 65536


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a few numbers are enough to draw by seed."""
    monkeypatch.setattr(dropping, "_FEW", 0)


def module(**options: bool) -> nn.Dropout:
    made = nn.Dropout(P, **options)
    assert drop_by_seed(made)
    return made


def of_torch(x: Tensor, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return F.dropout(x, P)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_dropped_or_grown_and_their_gradients_with_them(dtype: torch.dtype) -> None:
    x = (torch.rand(40, 7) + 1).to(dtype).requires_grad_()
    y = module()(x)
    stays = y != 0
    assert 0.5 < stays.double().mean() < 0.75
    torch.testing.assert_close(y[stays], (x / (1 - P))[stays])
    assert y.dtype is dtype
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, stays.to(dtype) / (1 - P))


def test_gradients_are_those_of_finite_differences_twice() -> None:
    made = module()

    def function(x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return made(x).square()

    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_for_backward_nothing_is_kept() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module()(torch.ones(9, requires_grad=True))
    assert y.requires_grad
    assert kept == []


def test_it_is_drawn_anew_each_time_and_follows_torchs_generator() -> None:
    made, x = module(), torch.ones(50)
    torch.manual_seed(5)
    first = [made(x) for _ in range(2)]
    torch.manual_seed(5)
    again = [made(x) for _ in range(2)]
    assert not torch.equal(*first)
    assert all(map(torch.equal, first, again))


def test_in_evaluation_and_with_probabilities_at_the_ends_it_is_torchs() -> None:
    made, x = module(), torch.randn(9)
    assert made.eval()(x) is x
    made.train().p = 0.0
    assert torch.equal(made(x), x)
    made.p = 1.0
    assert torch.equal(made(x), torch.zeros(9))


def test_under_torch_func_and_on_other_devices_it_is_torchs() -> None:
    made, x = module(), torch.randn(4, 9)
    found = torch.func.vmap(made, randomness="same")(x)
    dropped = found == 0
    assert torch.equal(dropped, dropped[0].expand(4, -1))
    assert made(torch.empty(3, device="meta")).is_meta


def test_complex_and_nested_tensors_are_torchs() -> None:
    made = module()
    with pytest.raises(RuntimeError, match="ComplexFloat"):  # torch's own
        made(torch.ones(9, dtype=torch.complex64))
    nested = torch.nested.as_nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    assert made(nested).is_nested


def test_compiled_it_is_the_operator_that_the_compiler_fuses() -> None:
    made, x = module(), torch.randn(9)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), of_torch(x))


def test_what_is_not_plain_dropout_is_left_alone() -> None:
    class Own(nn.Dropout):
        pass

    hooked = nn.Dropout(P)
    hooked.forward = torch.relu
    for other in (Own(P), nn.Dropout(P, inplace=True), nn.AlphaDropout(P), nn.Linear(2, 2), hooked):
        before = dict(vars(other))
        assert not drop_by_seed(other)
        assert vars(other) == before
        assert not drop_as_torch(other)


def test_copies_draw_by_seed_with_their_own_probability() -> None:
    made = module()
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert isinstance(twin.forward, BySeed)
        twin.p = 1.0
        assert not twin(torch.ones(3)).any()
    assert made.p == P


def test_optimize_frozen_takes_it_and_restore_frozen_gives_it_back() -> None:
    model = nn.Sequential(nn.Dropout(P), nn.Linear(3, 3), nn.Sequential(nn.Dropout(P)))
    model.requires_grad_(False)
    done = rw.optimize_frozen(model, measure=False)
    assert done.dropouts == ("0", "2.0")
    rw.restore_frozen(model)
    assert not any("forward" in vars(m) for m in model.modules())
    x = torch.randn(4, 3)
    torch.manual_seed(3)
    assert torch.equal(model[0](x), of_torch(x))


def test_what_drops_nothing_and_other_devices_are_left_alone() -> None:
    assert rw.optimize_frozen(nn.Sequential(nn.Dropout(0.0))).dropouts == ()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(P)).requires_grad_(False)
    assert rw.optimize_frozen(model).dropouts == ()
    assert not any("forward" in vars(m) for m in model.modules())


def test_few_numbers_and_tensors_of_another_class_are_dropped_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Own(Tensor):
        pass

    monkeypatch.setattr(dropping, "_FEW", 12)
    made = module()
    for x in (torch.randn(12), torch.randn(13).as_subclass(Own)):
        torch.manual_seed(3)
        assert torch.equal(made(x), of_torch(x))
    torch.manual_seed(3)
    assert not torch.equal(made(x.as_subclass(Tensor)), of_torch(x).as_subclass(Tensor))


def test_gradients_may_be_taken_for_several_at_once() -> None:
    x = torch.ones(40, requires_grad=True)
    y = module()(x)
    (found,) = torch.autograd.grad(y, x, torch.eye(40)[:3], is_grads_batched=True)
    assert torch.equal(found, torch.diag(y)[:3])


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_it_is_the_same_dropout(reentrant: bool) -> None:
    made, x = module(), torch.randn(30, requires_grad=True)

    def squared(x: Tensor) -> Tensor:
        return made(x).square()

    found: list[Tensor] = []
    for again in (False, True):
        torch.manual_seed(5)
        y = (
            torch.utils.checkpoint.checkpoint(squared, x, use_reentrant=reentrant)
            if again
            else squared(x)
        )
        torch.rand(3)  # the generator goes on between forward and backward
        y.sum().backward()
        assert x.grad is not None
        found.append(x.grad)
        x.grad = None
    assert torch.equal(*found)
