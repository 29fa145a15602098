"""Where the tensors of a file belong."""

import pytest
import torch

from rankwise.io.peft_places import factor_key, incomplete, misfits, mismatch, place
from rankwise.targets import sites

A, B = torch.ones(2, 8), torch.ones(8, 2)


@pytest.fixture
def table(base):
    return sites(base())


def test_each_tensor_finds_its_place(table):
    tensors = {
        factor_key("blocks.0.query", "A", embedding=False): A,
        factor_key("blocks.0.query", "B", embedding=False): B,
        factor_key("embed", "A", embedding=True): torch.ones(2, 20),
        factor_key("embed", "B", embedding=True): B,
        "base_model.model.head.weight": torch.ones(3, 8),
        "base_model.model.head.bias": torch.ones(3),
        "base_model.model.embed.base_layer.weight": torch.ones(20, 8),
    }
    found = place(tensors, table, ["blocks.0.query", "embed"], ["head"])
    assert found.problems == []
    assert found.adapted() == ["blocks.0.query", "embed"]
    assert found.sides("blocks.0.query")["B"] is B
    assert list(found.embedding) == ["embed"]
    assert list(found.trained) == ["head.weight", "head.bias"]
    assert list(found.base) == ["embed.weight"]
    assert list(misfits(found, table, dict.fromkeys(table, 2))) == []
    assert list(incomplete(found, table, ["head"])) == []


def test_a_module_that_is_not_there_is_told_with_the_nearest(table):
    found = place({}, table, [], ["haed"])
    assert found.problems == ["target_modules means no module of this model."]
    (problem,) = incomplete(found, table, ["haed"])
    assert problem == "the model has no module 'haed', which trained whole. Did you mean 'head'?"


def test_many_lost_tensors_are_told_quickly(table):
    # Looking for the nearest name takes milliseconds, so only the first few get a hint.
    lost = {f"base_model.model.nowhere.{i}.lora_A.weight": A for i in range(5000)}
    expected = [name for name in table if name.endswith("query")]
    problems = place(lost, table, expected, []).problems
    assert len(problems) == len(expected) + 5000
    assert sum("Did you mean" in problem for problem in problems) <= 3


def test_a_buffer_of_whole_numbers_stays_one():
    assert mismatch(torch.tensor(3), torch.tensor(0)) is None
    assert mismatch(torch.ones(2).half(), torch.ones(2)) is None
    assert "floating-point" in (mismatch(torch.tensor(3), torch.tensor(0.5)) or "")
    assert "has shape (2,), and (3,)" in (mismatch(torch.ones(2), torch.ones(3)) or "")
