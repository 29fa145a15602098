"""Where adapters meet the habits of real models: owners, order, modes, overlaps, assignment."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.errors import ArtifactError, UserError
from rankwise.layers import LoRALayer, LowRank

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


class Attends(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.att(x, x, x, need_weights=False)[0])


def seeded(kind: type[nn.Module], *arguments: object) -> nn.Module:
    torch.manual_seed(1)
    return kind(*arguments).requires_grad_(False)


def lora(*targets: str, **options: object) -> rw.LoRA:
    return rw.LoRA(r=2, target_modules=targets, head="freeze", **options)  # type: ignore[arg-type]


def move(model: nn.Module, name: str | None = None) -> None:
    with torch.no_grad():
        for update in updates_of(model, name).values():
            for p in update.trained():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


# --- an owner whose parameter and whose child are both adapted ------------------------------------


def test_a_child_named_before_its_owner_keeps_its_update():
    model = seeded(Attends).eval()
    rw.attach(model, lora("out_proj", bias="all"))
    assert isinstance(model.att.out_proj, LoRALayer)  # type: ignore[union-attr]
    move(model)
    adapter = rw.adapter_of(model)
    y = run(model)
    assert rw.merge(model, probe=X).passed
    rw.unmerge(model)
    rw.detach(model)
    assert not any(isinstance(m, LoRALayer) for m in model.modules())
    turned = dataclasses.replace(adapter, factors=dict(reversed(adapter.factors.items())))
    rw.attach(model, turned)
    assert torch.equal(run(model), y)


def test_parameters_that_are_assigned_reach_an_adapted_owner_and_stay():
    model, other = seeded(Attends).eval(), Attends().requires_grad_(False).eval()
    rw.attach(model, lora("q_proj"))
    state = {k: t.clone() for k, t in other.state_dict().items()}
    model.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(run(model), run(other))
    rw.detach(model)
    assert torch.equal(run(model), run(other))


def test_an_owner_with_a_name_that_is_needed_is_refused():
    class Branchy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = nn.Parameter(torch.zeros(2, 3, 3))
            self.branch = nn.Linear(3, 3)

    model = nn.Sequential(Branchy())
    with pytest.raises(UserError, match="Branchy has a branch of its own"):
        rw.attach(model, lora("bank"))
    assert type(model[0]) is Branchy


# --- modes ----------------------------------------------------------------------------------------


def test_a_model_in_training_mode_is_merged_and_keeps_its_buffers():
    model = seeded(Attends, 0.5).train()
    rw.attach(model, lora("q_proj"))
    move(model)
    assert rw.merge(model, probe=X).passed
    assert model.att.training  # type: ignore[union-attr]
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = norm[1].running_mean.clone()  # type: ignore[union-attr,operator]
    rw.attach(norm, lora("0", bias="all"))
    assert rw.merge(norm, probe=torch.randn(6, 4)).passed
    assert torch.equal(norm[1].running_mean, before)  # type: ignore[arg-type]


def test_a_head_that_comes_back_follows_the_mode():
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)
            self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = seeded(Headed).train()
    rw.attach(model, WHOLE)
    model.eval()
    rw.detach(model)
    assert torch.equal(run(model), run(model))


# --- several adapters that would change one module ------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


WHOLE = rw.LoRA(r=2, target_modules=["body"], head="freeze", modules_to_save=["head"])
PART = rw.LoRA(r=2, target_modules=["body"], head="freeze", modules_to_save=["head.1"])


@pytest.mark.parametrize(
    ("first", "second"),
    [(lora("head.1", "body"), WHOLE), (WHOLE, lora("head.1")), (WHOLE, PART), (PART, WHOLE)],
)
def test_a_module_trained_whole_is_not_changed_in_part_by_another(first: rw.LoRA, second: rw.LoRA):
    model = seeded(Nested)
    rw.attach(model, first, name="a")
    before, state = run(model), list(model.state_dict())
    with pytest.raises(UserError, match=r"trains the module as a whole.*Detach 'a' first"):
        rw.attach(model, second, name="b")
    assert torch.equal(run(model), before)
    assert list(model.state_dict()) == state
    rw.detach(model)
    assert torch.equal(run(model), run(seeded(Nested)))


def test_setting_what_trains_is_refused_while_merged_and_for_a_base_that_trains():
    model = seeded(Nested)
    rw.attach(model, lora("body"))
    rw.merge(model)
    with pytest.raises(UserError, match="merged"):
        rw.set_trainable(model)
    model = Nested()
    rw.attach(model, rw.Full())
    with pytest.raises(UserError, match="Full trains the base itself"):
        rw.set_trainable(model)


# --- slots ----------------------------------------------------------------------------------------


def test_a_slot_with_a_start_begins_at_the_base_and_takes_a_plain_adapter():
    model, other = seeded(Nested), seeded(Nested)
    before = run(model)
    rw.attach(model, lora("body", init=rw.PiSSA(), slot=4))
    assert torch.equal(run(model), before)
    rw.attach(other, lora("body", alpha=5.0 / 3))
    move(other)
    rw.hotswap(model, rw.adapter_of(other))
    torch.testing.assert_close(run(model), run(other), rtol=1e-5, atol=1e-5)
    rw.attach(seeded(Nested), rw.adapter_of(model))  # a scale that float32 does not hold


def test_a_head_of_another_shape_finds_no_room_and_nothing_is_changed():
    class Wide(Nested):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))

    model, other = seeded(Nested), seeded(Wide)
    rw.attach(model, dataclasses.replace(WHOLE, slot=2))
    rw.attach(other, WHOLE)
    before = run(model)
    with pytest.raises(ArtifactError, match="its 'head' holds"):
        rw.hotswap(model, rw.adapter_of(other))
    assert torch.equal(run(model), before)


# --- layers that are not as plain as they look ----------------------------------------------------


def test_dora_beside_a_bias_that_is_computed_starts_at_the_base_and_merges_into_it():
    class Doubled(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    model = seeded(Nested)
    nn.utils.parametrize.register_parametrization(model.body, "bias", Doubled())  # type: ignore[arg-type]
    rw.attach(model, lora("body", dora=True))
    move(model)
    layer = model.body
    with torch.no_grad():
        expected = X @ layer.weight.T + layer.base_layer.bias  # type: ignore[union-attr,operator]
        torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-4)  # type: ignore[operator]


def test_a_convolution_is_asked_for_its_geometry_and_called_by_keyword():
    class Front(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] % self.conv.stride[0] == 0
            return self.conv(input=x)

    model = seeded(Front)
    rw.attach(model, lora("conv"))
    move(model)
    x = torch.randn(2, 4, 8)
    assert rw.merge(model, probe=x).passed


def test_a_bias_that_two_layers_share_ties_no_weight():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.bias = self.a.bias

    model = Pair()
    record = rw.attach(model, lora("a", "b", tied=True))
    assert record.adapted == ("a", "b")
    assert not any("shares its weight" in note for note in record.notes)
    assert all(isinstance(u, LowRank) for u in updates_of(model).values())


def test_token_rows_made_on_meta_are_right_when_they_are_filled():
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))

    method = rw.LoRA(r=1, target_modules=["1"], trainable_tokens={"0": [7, 2]})
    model = build()
    rw.attach(model, method)
    move(model)
    with torch.device("meta"):
        empty = build()
    rw.attach(empty, method)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    ids = torch.arange(9)
    assert torch.equal(run(empty, ids), run(model, ids))


def test_the_record_does_not_hold_on_to_batches():
    class Batches:
        def __iter__(self):
            return iter([X])

    model = seeded(Nested)
    rw.attach(model, lora("body", init=rw.EVA(Batches())))  # type: ignore[arg-type]
    assert rw.attachment(model).method.init == rw.Kaiming()  # type: ignore[union-attr]
