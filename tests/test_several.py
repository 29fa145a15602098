"""Several adapters on one model: stacking, switching, training apart, and slots."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.errors import ArtifactError, UserError
from rankwise.layers import LoRALayer
from zoo import IDS, Zoo

TARGETS = ("keys", "packed.q_proj", "mix", "experts.up_proj", "tokens")


def zoo() -> Zoo:
    torch.manual_seed(2)
    return Zoo().requires_grad_(False).eval()


def lora(r: int = 2, targets: tuple[str, ...] = TARGETS, **options: object) -> rw.LoRA:
    return rw.LoRA(r=r, target_modules=targets, head="freeze", **options)  # type: ignore[arg-type]


def move(model: nn.Module, name: str, seed: int, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for update in updates_of(model, name).values():
            for p in update.trained():
                p.add_(torch.randn(p.shape, generator=generator) * size)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def weight(model: Zoo) -> Tensor:
    return model.keys.weight.detach().clone()


@pytest.fixture
def two() -> Zoo:
    """A model with two trained adapters, on overlapping layers."""
    model = zoo()
    rw.attach(model, lora(), name="first")
    move(model, "first", 1)
    rw.attach(model, lora(3, (*TARGETS[:3], "linear1"), dora=True), name="second")
    move(model, "second", 2)
    return model


def test_effects_add_in_every_weight(two: Zoo):
    base, both = weight(zoo()), weight(two)
    with rw.using(two, "first"):
        first = weight(two)
    with rw.using(two, "second"):
        second = weight(two)
    torch.testing.assert_close(both - base, (first - base) + (second - base))
    assert (first - base).abs().max() > 0.1
    assert (second - base).abs().max() > 0.1


def test_each_alone_is_what_it_is_on_a_model_of_its_own(two: Zoo):
    for name in ("first", "second"):
        alone = zoo()
        rw.attach(alone, rw.adapter_of(two, name))
        rw.set_active(two, name)
        torch.testing.assert_close(run(two), run(alone), rtol=0, atol=0)
    rw.set_active(two)
    assert torch.equal(run(two), run(zoo()))


def test_switching_touches_no_layer(two: Zoo):
    modules = {n: id(m) for n, m in two.named_modules()}
    bits = copy.deepcopy(two.state_dict())
    looked = []
    original = nn.Module.named_modules
    try:
        nn.Module.named_modules = lambda self, *a, **k: looked.append(1) or original(self, *a, **k)  # type: ignore[method-assign]
        for _ in range(3):
            rw.set_active(two, "first")
            rw.set_active(two, "second")
    finally:
        nn.Module.named_modules = original  # type: ignore[method-assign]
    assert not looked  # constant time: the modules of the model are not even walked
    assert {n: id(m) for n, m in two.named_modules()} == modules
    assert all(torch.equal(t, bits[k]) for k, t in two.state_dict().items())


def test_what_acts_and_what_trains_are_two_things(two: Zoo):
    rw.set_trainable(two, "first")
    rw.set_active(two, "first", "second")
    names = {n for n, p in two.named_parameters() if p.requires_grad}
    assert names
    assert all("updates.first" in n for n in names)
    two(IDS).square().mean().backward()
    assert {n for n, p in two.named_parameters() if p.grad is not None} == names
    rw.set_active(two, "second")
    assert {n for n, p in two.named_parameters() if p.requires_grad} == names
    rw.set_trainable(two)
    assert not any(p.requires_grad for p in two.parameters())


def test_using_and_base_come_back_even_when_the_block_fails(two: Zoo):
    rw.set_active(two, "second")
    before = run(two)
    for block in (rw.using(two, "first"), rw.base(two)):
        with pytest.raises(KeyError), block:
            _differs_and_fails(two, before)
        assert torch.equal(run(two), before)


def _differs_and_fails(model: nn.Module, before: Tensor) -> None:
    assert not torch.equal(run(model), before)
    raise KeyError


def test_detaching_one_leaves_the_other_as_it_was(two: Zoo):
    rw.set_active(two, "second")
    before = run(two)
    rw.detach(two, "first")
    assert list(rw.attachments(two)) == ["second"]
    assert torch.equal(run(two), before)
    assert not isinstance(two.tokens, LoRALayer)
    assert not isinstance(two.experts, LoRALayer)
    rw.detach(two)
    assert {n: type(m) for n, m in two.named_modules()} == {
        n: type(m) for n, m in zoo().named_modules()
    }
    assert torch.equal(run(two), run(zoo()))


def test_merging_a_stack_is_merging_the_sum(two: Zoo):
    before = run(two)
    assert rw.merge(two, probe=IDS).passed
    torch.testing.assert_close(run(two), before, rtol=1e-4, atol=1e-4)
    rw.unmerge(two)
    assert torch.equal(run(two), before)
    rw.set_active(two, "first")
    with pytest.raises(UserError, match=r"second: attached and not active.*set_active.*detach"):
        rw.merge(two)


def test_names_are_told_when_one_is_missing_or_wrong(two: Zoo):
    with pytest.raises(UserError, match="several adapters; name one of first, second"):
        rw.adapter_of(two)
    with pytest.raises(UserError, match=r"no adapter named 'frist'.*Did you mean 'first'"):
        rw.set_active(two, "frist")
    with pytest.raises(UserError, match=r"named 'first'.*name='...'"):
        rw.attach(two, lora(), name="first")
    for bad in ("", "a.b", "a/b", "../x"):
        with pytest.raises(UserError, match="letters, digits"):
            rw.attach(two, lora(), name=bad)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def test_heads_of_two_tasks_are_switched_with_their_adapters():
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(4, 6)
    base, head = model(x), model.head
    method = rw.LoRA(r=2, target_modules=["body"], head="train")
    rw.attach(model, method, name="one")
    with torch.no_grad():
        model.head.bias.add_(1.0)
    one = model(x)
    record = rw.attach(model, method, name="two")
    assert not record.active
    assert "'two' is attached but switched off: 'one' is active" in record.notes[-1]
    assert torch.equal(model(x), one)
    rw.set_active(model, "two")
    assert torch.equal(model(x), base)  # a copy of the base's own head, not of the other's
    with torch.no_grad():
        model.head.bias.sub_(2.0)
    two = model(x)
    rw.set_active(model, "one")
    assert torch.equal(model(x), one)
    with pytest.raises(
        UserError, match="'one' and 'two' both have their own trained copy of 'head'"
    ):
        rw.set_active(model, "one", "two")
    with rw.using(model, "two"):
        assert torch.equal(model(x), two)
    with rw.using(model):
        assert model.head is head
    rw.detach(model, "one")
    rw.set_active(model, "two")
    assert torch.equal(model(x), two)
    rw.detach(model)
    assert model.head is head


# --- slots ---------------------------------------------------------------------------------------


def trained_adapter(r: int, seed: int, targets: tuple[str, ...] = ("keys", "fused", "mix")):
    model = zoo()
    rw.attach(model, lora(r, targets, alpha=3.0 * r))
    move(model, "default", seed)
    return rw.adapter_of(model), run(model)


def test_what_is_put_back_follows_the_model_to_its_dtype():
    """With double() or bfloat16() as with to(device), whichever version hung there meanwhile."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(3, 4))
    model.add_module("head", nn.Linear(4, 2))
    original = model.get_submodule("head")
    before = model(x := torch.randn(2, 3))
    for name in ("first", "second"):
        rw.attach(model, rw.LoRA(r=1, target_modules=["body"], head="train"), name=name)
    model.double()
    rw.set_active(model, "second")
    assert model(x.double()).dtype == torch.float64
    rw.detach(model, "second")
    rw.detach(model)
    assert model.get_submodule("head") is original
    assert torch.allclose(model(x.double()), before.double(), atol=1e-6)


def test_a_slot_takes_any_adapter_that_has_room_and_gives_it_back():
    model = zoo()
    rw.attach(model, lora(2, ("keys", "fused", "mix"), slot=6))
    for r, seed in ((6, 1), (1, 2), (4, 3)):
        adapter, expected = trained_adapter(r, seed)
        rw.hotswap(model, adapter)
        torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
        back = rw.adapter_of(model)
        assert back.method.spec("keys").scale == adapter.method.spec("keys").scale
        for name, factors in adapter.factors.items():
            assert torch.equal(back.factors[name].A, factors.A)
            assert torch.equal(back.factors[name].B, factors.B)


def test_an_adapter_of_fewer_layers_leaves_the_others_without_an_update():
    model = zoo()
    rw.attach(model, lora(2, ("keys", "fused", "mix"), slot=4))
    adapter, expected = trained_adapter(4, 5, ("fused",))
    rw.hotswap(model, trained_adapter(3, 1)[0])
    rw.hotswap(model, adapter)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    assert list(rw.adapter_of(model).factors) == ["fused"]


def test_what_does_not_fit_into_a_slot_is_refused_and_nothing_changes():
    model = zoo()
    rw.attach(model, lora(2, ("keys", "fused"), slot=3))
    before = run(model)
    with pytest.raises(ArtifactError) as caught:
        rw.hotswap(model, trained_adapter(4, 1)[0])
    message = str(caught.value)
    assert "'keys' has rank 4, and the slot has room for 3" in message
    assert "nothing is attached at 'mix'" in message
    assert torch.equal(run(model), before)
    rw.detach(model)
    rw.attach(model, lora())
    with pytest.raises(UserError, match=r"no slots. Attach it with LoRA\(..., slot=R\)"):
        rw.hotswap(model, trained_adapter(1, 1)[0])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def plain_adapter(r: int, seed: int):
    torch.manual_seed(0)
    model = Plain()
    rw.attach(model, rw.LoRA(r=r, alpha=r * 1.5, target_modules=["first"], head="freeze"))
    move(model, "default", seed)
    return rw.adapter_of(model), model


def test_a_compiled_model_takes_a_second_adapter_without_being_compiled_again():
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(5, 8)
    rw.attach(model, rw.LoRA(r=2, target_modules=["first"], head="freeze", slot=4))
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        for r, seed in ((4, 1), (1, 2), (3, 3)):
            adapter, alone = plain_adapter(r, seed)
            rw.hotswap(model, adapter)
            torch.testing.assert_close(compiled(x), alone(x), rtol=1e-5, atol=1e-5)
    assert compilations == 1
