"""A model as a graph: which axes stay open, what is refused, and inputs of another shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.errors import RankwiseError, UserError
from rankwise.train.graph import ExportError, Graph, other_shape, trace

IDS = torch.arange(12).reshape(3, 4)


class Reader(nn.Module):
    """Embeds ids, with a table of ten positions, and counts with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6)
        self.places = nn.Parameter(torch.randn(10, 6))

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = (self.words(ids) + self.places[: ids.shape[1]]) * scale
        return x if mask is None else x * mask[..., None]


class Returns(nn.Module):
    """Gives its input back in the way it is told to."""

    def __init__(self, how: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> object:
        return self.how(x * 2)


def traced(model: nn.Module, *values: Any, dynamic: Any = None, **named: Any) -> Graph:
    with torch.no_grad():
        return trace(model.eval(), named or list(values), dynamic)


def refused(model: nn.Module, example: Any, dynamic: Any = None) -> RankwiseError:
    with pytest.raises(RankwiseError) as caught:
        trace(model.eval(), example, dynamic)
    return caught.value


def test_batch_and_length_stay_open_up_to_what_the_model_takes():
    model = Reader()
    graph = traced(model, ids=IDS, mask=torch.ones(3, 4, dtype=torch.long))
    assert graph.axes == {"ids": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    assert graph.longest == {"batch": None, "length": 10}
    run = graph.program.module()
    for rows, length in ((1, 1), (1, 10), (5, 7)):
        ids, mask = torch.randint(12, (rows, length)), torch.randint(2, (rows, length))
        assert torch.equal(run(ids=ids, mask=mask)["output"], model(ids, mask))


def test_the_inputs_are_the_tensors_by_the_names_of_the_model_s_arguments():
    model = Reader()
    graph = traced(model, IDS, None, 3.0)
    assert list(graph.inputs) == ["ids"]
    found = graph.program.module()(ids=IDS[:2])["output"]
    assert torch.equal(found, model(IDS[:2], None, 3.0))


def test_only_the_axes_that_were_asked_for_stay_open():
    graph = traced(Reader(), ids=IDS, dynamic={"ids": {1: "words"}})
    assert graph.longest == {"words": 10}
    graph.program.module()(ids=IDS[:, :2])
    with pytest.raises(AssertionError, match="Guard failed"):
        graph.program.module()(ids=IDS[:2])
    fixed = traced(Reader(), ids=IDS, dynamic={})
    assert (fixed.axes, fixed.longest) == ({"ids": {}}, {})


@pytest.mark.parametrize(
    ("how", "names"),
    [
        (lambda x: x, ("output",)),
        (lambda x: (x, x.argmax(-1), x + 1), ("output_0", "output_2")),
        (lambda x: {"hidden": x, "pooled": x.sum(1)}, ("hidden", "pooled")),
        (lambda x: {"loss": x.sum(), "logits": x}, ("logits",)),
    ],
)
def test_outputs_are_named(how: Callable[[Tensor], object], names: tuple[str, ...]):
    x = torch.randn(3, 4)
    graph = traced(Returns(how), x)
    assert graph.outputs == names
    found = graph.program.module()(x=x)
    assert tuple(found) == names
    assert torch.equal(found[names[0]], 2 * x)


def test_a_transformers_model_gives_its_logits_without_a_cache():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    graph = traced(LlamaForCausalLM(config), input_ids=IDS)
    assert (list(graph.inputs), graph.outputs) == (["input_ids"], ("logits",))


# --- what is refused -----------------------------------------------------------------------------


def test_an_axis_that_the_model_fixes_is_told():
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], 2, 2) * 1.0

    error = refused(Fixed(), IDS)
    assert isinstance(error, ExportError)
    assert "Axis 1 of 'x' cannot stay open: the model fixes it to 4" in str(error)
    assert traced(Fixed(), IDS, dynamic={"x": {0: "batch"}}).longest == {"batch": None}
    assert "an example in which it is 2 or more" in str(refused(Reader(), IDS[:, :1]))


@pytest.mark.parametrize(
    ("example", "dynamic", "told"),
    [
        ({"ids": IDS}, {"id": {0: "n"}}, "the example has no input 'id', but ids"),
        ({"ids": IDS}, {"ids": {2: "n"}}, "'ids' (3, 4) has no axis 2"),
        ({"ids": IDS}, {"ids": {0: "n", 1: "n"}}, "'n' is 3 and 4 at once"),
        ({"scale": 2.0}, None, "The example needs tensors"),
        ({"ids": IDS[:0]}, None, "The example needs tensors, and none"),
        ([IDS, IDS, 1.0, 2.0], None, "Reader takes 3 inputs, got 4"),
    ],
)
def test_examples_and_axes_that_do_not_fit(example: Any, dynamic: Any, told: str):
    error = refused(Reader(), example, dynamic)
    assert isinstance(error, UserError)
    assert told in str(error)


def test_outputs_without_numbers_are_refused():
    assert "without a floating-point tensor" in str(refused(Returns(lambda x: "x"), IDS))


# --- inputs of another shape ---------------------------------------------------------------------


def test_the_other_shape_differs_in_every_open_axis():
    graph = traced(Reader(), ids=IDS)
    assert torch.equal(other_shape(graph)["ids"], IDS[:1, :2])
    graph = traced(Reader(), ids=IDS, dynamic={"ids": {1: "length"}})
    assert torch.equal(other_shape(graph)["ids"], IDS[:, :2])
    graph = traced(Reader(), ids=IDS[:1])
    assert torch.equal(other_shape(graph)["ids"], torch.cat([IDS[:1, :2]] * 2))


def test_the_other_shape_keeps_the_side_that_is_not_padded():
    class Masked(nn.Module):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return ids * attention_mask * 1.0

    behind = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    for mask, kept in ((behind, slice(0, 2)), (behind.flip(1), slice(2, 4))):
        graph = traced(Masked(), ids=IDS, attention_mask=mask)
        other = other_shape(graph)
        assert torch.equal(other["ids"], IDS[:1, kept])
        assert torch.equal(other["attention_mask"], mask[:1, kept])
