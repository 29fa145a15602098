"""Looking at a running model: what is seen, and that the model is left as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.inits import Place
from rankwise.inits.watching import batched, call, hooked, name_all, untouched

PlaceOf = Callable[..., Place]
StateOf = Callable[[nn.Module], Callable[[], None]]


class Busy(nn.Linear):
    """A layer whose modes are more than flags, as loralib's are."""

    def train(self, mode: bool = True) -> "Busy":
        with torch.no_grad():
            self.weight.add_(1.0)
        return super().train(mode)


def test_modes_and_random_numbers_come_back(state_of: StateOf):
    model = nn.Sequential(Busy(3, 3), nn.Dropout(), nn.BatchNorm1d(3))
    model[1].training = False
    check = state_of(model)
    with untouched(model):
        assert not any(m.training for m in model.modules())
        assert not torch.backends.mha.get_fastpath_enabled()
        torch.rand(3)
        model(torch.rand(4, 3))
    check()


def test_they_come_back_after_an_error_as_well(state_of: StateOf):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    check = state_of(model)
    with pytest.raises(ZeroDivisionError), untouched(model):
        model(torch.rand(3) / (1 // 0))
    check()


@pytest.mark.parametrize(
    "batch",
    [torch.ones(2, 3), (torch.ones(2, 3),), [torch.ones(2, 3)], {"input": torch.ones(2, 3)}],
)
def test_a_batch_may_be_a_tensor_a_sequence_or_a_mapping(batch: Any):
    layer = nn.Linear(3, 4)
    assert torch.equal(torch.as_tensor(call(layer, batch)), layer(torch.ones(2, 3)))


def forms(x: Tensor) -> list[Any]:
    return [x, (x, "a"), [x], {"x": x, "n": 3}]


def test_batches_are_counted_and_passed_on_themselves():
    given = forms(torch.ones(2))
    found = list(batched("EVA", given, nn.Linear(3, 4)))
    assert [number for number, _ in found] == [0, 1, 2, 3]
    assert all(batch is one for (_, batch), one in zip(found, given, strict=True))


@pytest.mark.parametrize(
    "batch", forms(torch.ones(2, device="meta")), ids=lambda b: type(b).__name__
)
def test_batches_elsewhere_are_brought_to_the_models_device(batch: Any):
    # The only other device that every machine has is meta, which says that it cannot be left.
    with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
        list(batched("EVA", [batch], nn.Linear(3, 4)))


def test_no_batches_are_an_error():
    gone = iter([torch.ones(2)])
    list(gone)
    with pytest.raises(UserError, match="EVA was given no batches"):
        list(batched("EVA", gone, nn.Linear(2, 2)))


def test_hooks_see_inputs_and_outputs_however_a_module_is_called(place_of: PlaceOf):
    layer = nn.Linear(3, 6)
    parts = [place_of(layer, name=f"layer.{n}", rows=(n,)) for n in range(2)]
    seen: list[tuple[list[str], Tensor, Tensor]] = []

    def look(module: nn.Module, places: Any, x: Tensor, y: Tensor) -> None:
        assert module is layer
        seen.append(([p.name for p in places], x, y))

    x = torch.ones(2, 3)
    with hooked(parts, look):
        y = layer(x)
        layer(input=x)
    layer(x)
    assert len(seen) == 2
    for names, given, gave in seen:
        assert names == ["layer.0", "layer.1"]
        assert given is x
        assert torch.equal(gave, y)


def test_a_look_may_give_another_output(place_of: PlaceOf):
    layer = nn.Linear(3, 6)
    with hooked([place_of(layer)], lambda module, places, x, y: y + 1):
        more = layer(torch.ones(2, 3))
    assert torch.equal(more, layer(torch.ones(2, 3)) + 1)


def test_a_module_without_tensors_cannot_be_watched(place_of: PlaceOf):
    class Odd(nn.Linear):
        def forward(self, x: Any) -> Any:
            return [x]

    layer = Odd(3, 3)
    with (
        hooked([place_of(layer, name="odd")], lambda *_: None),
        pytest.raises(UserError, match="'odd': Odd was called without a tensor"),
    ):
        layer(torch.ones(3))


def test_a_few_names_are_written_out():
    assert name_all(["a", "b"]) == "'a', 'b'"
    assert name_all("abcd", limit=2) == "'a', 'b' and 2 more"
