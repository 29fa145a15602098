"""W0 from the base's files is the weight that the loaded model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rankwise.attaching import low_rank_updates
from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import blueprint
from rankwise.io.convert import read_any
from rankwise.io.portable import Portable, assemble
from rankwise.io.weights import base_weight, weight_key
from rankwise.layers import Split
from rankwise.lowrank import Factors
from rankwise.train.restore import restore


@pytest.mark.parametrize("kind", ["single", "gpt2", "llama"])
def test_every_weight_is_the_models(kind: str, finished: Callable[[str], Path]) -> None:
    """BERT's file has no name of the task's model in front, GPT-2's weights lie (in, out)."""
    run = finished(kind)
    restored = restore(run)
    portable, base = read_any(run), blueprint(restored.config.model)
    model = restored.base.model
    assert portable.factors
    for name in portable.factors:
        layer = model.get_submodule(name)
        layout = low_rank_updates(model)[name].layout
        wanted = layout.matrix(layer.base_weight(layout.parameter))
        assert torch.equal(base_weight(portable, name, base), wanted)


def test_a_part_is_its_rows_and_an_embedding_lies_the_other_way(gpt2: Path) -> None:
    base = blueprint(gpt2)
    (fused,) = [k for k in base.shapes if k.endswith("h.0.attn.c_attn.weight")]
    (table,) = [k for k in base.shapes if k.endswith("wte.weight")]
    module, words = fused.removesuffix(".weight"), table.removesuffix(".weight")
    split = {module: Split(("q", "k", "v"))}
    part = Factors(torch.ones(1, 32), torch.ones(32, 1), 1.0)
    attention = Portable(assemble({f"{module}.k": part}, splits=split), transposed=True)
    wanted = base.fetch(fused).T[32:64]
    assert torch.equal(base_weight(attention, f"{module}.k", base), wanted)
    rows = base.shapes[table][0]
    looked = Factors(torch.ones(1, rows), torch.ones(32, 1), 1.0)
    embedding = Portable(assemble({words: looked}), embeddings=frozenset({words}))
    assert torch.equal(base_weight(embedding, words, base), base.fetch(table).T)


def test_another_base_is_refused(bert: Path) -> None:
    base = blueprint(bert)
    name = "encoder.layer.0.attention.self.query"
    wide = Portable(assemble({name: Factors(torch.ones(1, 48), torch.ones(32, 1), 1.0)}))
    with pytest.raises(ArtifactError, match=r"is \(32, 32\) in .* and \(32, 48\) in the adapter"):
        base_weight(wide, name, base)
    with pytest.raises(UserError, match=r"no weight of 'layer.9.query'"):
        weight_key("layer.9.query", base.shapes, base.where)


def test_names_with_more_or_less_in_front_are_found() -> None:
    shapes = {"model.a.q.weight": (1, 1), "b.q.weight": (1, 1), "lin.weight": (1, 1)}
    assert weight_key("a.q", shapes, "x") == "model.a.q.weight"
    assert weight_key("bert.b.q", shapes, "x") == "b.q.weight"
    assert weight_key("lin", shapes, "x") == "lin.weight"
