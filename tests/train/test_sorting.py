"""Names of two checkpoints are matched by their ends, and tied or strange tensors are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankwise.errors import ArtifactError
from rankwise.io.blueprint import Blueprint, blueprint
from rankwise.train.blank import blank_model
from rankwise.train.sorting import Pair, changed, sort_tensors


def test_the_same_checkpoint_is_untouched(bert: Path) -> None:
    files = blueprint(bert)
    found = sort_tensors(blank_model(str(bert)), files, files)
    assert found.untouched == len(files.shapes)
    assert (found.low_rank, found.biases, found.whole) == ((), (), {})
    assert (found.loose, found.renamed) == ((), ())


def test_a_checkpoint_that_lacks_a_weight_is_damaged(bert: Path) -> None:
    files = blueprint(bert)
    shapes = {n: s for n, s in files.shapes.items() if "query" not in n}
    short = Blueprint("short", files.config, shapes, files.fetch)
    with pytest.raises(ArtifactError, match=r"there is no 'encoder.layer.0.attention.self.query"):
        sort_tensors(blank_model(str(bert)), files, short)


def test_a_tensor_of_another_name_and_size_stands_for_none_that_lacks(bert: Path) -> None:
    files = blueprint(bert)
    shapes = {n: s for n, s in files.shapes.items() if "query" not in n}
    junk = Blueprint("junk", files.config, {**shapes, "rope.inv_freq": (8,)}, files.fetch)
    with pytest.raises(ArtifactError, match=r"junk does not hold the model of its config.json"):
        sort_tensors(blank_model(str(bert)), files, junk)


def test_a_change_is_taken_in_float32_and_as_out_by_in() -> None:
    first, second = torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16()
    base = Blueprint("base", {}, {"w": (4, 6)}, {"w": first}.__getitem__)
    tuned = Blueprint("tuned", {}, {"w": (4, 6)}, {"w": second}.__getitem__)
    weight, delta = changed(Pair("w", "w", "w", transposed=True), base, tuned)
    assert torch.equal(weight, first.T)
    assert torch.equal(delta, (second.float() - first.float()).T)
