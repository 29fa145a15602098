"""An adapter without a model: its method means its factors, its halves belong together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankwise
from rankwise.errors import ArtifactError
from rankwise.io.portable import Portable, assemble, pairs
from rankwise.layers import Split
from rankwise.lowrank import Factors


def f(r: int = 2, out: int = 6, scale: float = 1.5) -> Factors:
    return Factors(torch.randn(r, 5), torch.randn(out, r), scale)


def test_an_assembled_adapter_can_be_attached():
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(5, 6), "b": torch.nn.Linear(5, 6), "head": torch.nn.Linear(6, 2)}
    )
    own = {"a": f(), "b": f(3, scale=0.25)}
    head = {"head.weight": torch.randn(2, 6), "head.bias": torch.randn(2)}
    adapter = assemble(own, trained=head, modules=["head"], biases={"a.bias": torch.ones(6)})
    before = {n: model[n].weight.detach().clone() for n in own}
    bias = model["a"].bias.detach() + 1
    rankwise.attach(model, adapter)
    for name, factors in own.items():
        torch.testing.assert_close(model[name].weight, before[name] + factors.delta())
    torch.testing.assert_close(model["a"].bias, bias)
    assert torch.equal(model["head"].weight, head["head.weight"])


@pytest.mark.parametrize(
    ("biases", "word"), [({}, "none"), ({"a.bias": 1}, "adapted"), ({"norm.bias": 1}, "all")]
)
def test_the_method_says_which_biases_trained(biases: dict[str, Any], word: str):
    tensors = {name: torch.ones(6) for name in biases}
    assert assemble({"a": f()}, biases=tensors).method.bias == word


def test_names_that_end_alike_are_told_apart():
    own = {"q": f(1), "x.q": f(2), "y.x.q": f(3, scale=2.0)}
    method = assemble(own).method
    assert [method.spec(name).r for name in own] == [1, 2, 3]


def test_parts_are_found_by_their_split_and_in_its_order():
    split = Split(("q", "k", "v"), (2, 2, 2))
    own = {n: f(out=2) for n in ("h.0.c.v", "other.v", "h.0.c.q", "h.1.c.k")}
    portable = Portable(assemble(own, splits={"h.0.c": split, "h.1.c": split}))
    assert portable.parts() == {"h.0.c": ["h.0.c.q", "h.0.c.v"], "h.1.c": ["h.1.c.k"]}
    assert portable.split("h.1.c") == split


@pytest.mark.parametrize(
    ("both", "told"),
    [
        ({"A": torch.ones(2, 5)}, "'q' has no B"),
        ({"B": torch.ones(6, 2)}, "'q' has no A"),
        ({"A": torch.ones(2, 5).int(), "B": torch.ones(6, 2)}, r"'q' is torch\.int32"),
        ({"A": torch.ones(5, 2), "B": torch.ones(6, 2)}, r"A \(5, 2\) and B \(6, 2\)"),
        ({"A": torch.ones(2), "B": torch.ones(6, 2)}, r"A \(2,\)"),
        ({"A": torch.ones(0, 5), "B": torch.ones(6, 0)}, r"A \(0, 5\)"),
    ],
)
def test_halves_that_do_not_belong_together_are_named(both: dict[str, Any], told: str):
    with pytest.raises(ArtifactError, match=rf"'x' cannot be used: .*{told}"):
        pairs({"q": both}, "'x'")


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ArtifactError, match=r"(?s)'a' has no B.*'b' has no A"):
        pairs({"a": {"A": torch.ones(1, 1)}, "b": {"B": torch.ones(1, 1)}}, "'x'")
    with pytest.raises(ArtifactError, match="it holds no low-rank factors"):
        pairs({}, "'x'")
