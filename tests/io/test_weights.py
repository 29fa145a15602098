"""W0 from the base's files is the weight that the loaded model has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foreign import load
from rankwise.attaching import low_rank_updates
from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import blueprint
from rankwise.io.convert import read_any
from rankwise.io.portable import Portable, assemble
from rankwise.io.weights import base_weight, tensor_key, weight_key
from rankwise.layers import Split, layout_of
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
    strange = Portable(
        assemble({"layer.9.query": Factors(torch.ones(1, 32), torch.ones(32, 1), 1)})
    )
    with pytest.raises(UserError, match=r"no weight of 'layer.9.query'"):
        base_weight(strange, "layer.9.query", base)


def test_names_with_more_or_less_in_front_are_found() -> None:
    shapes = {"model.a.q.weight": (1, 1), "b.q.weight": (1, 1), "lin.weight": (1, 1)}
    assert weight_key("a.q", shapes) == "model.a.q.weight"
    assert weight_key("bert.b.q", shapes) == "b.q.weight"
    assert weight_key("lin", shapes) == "lin.weight"
    assert weight_key("c.q", shapes) is None
    assert tensor_key("bert.b.q.weight", shapes) == "b.q.weight"
    assert tensor_key("q.weight", shapes) is None  # two end so


def one(name: str, out: int, inside: int, **more: Any) -> Portable:
    return Portable(
        assemble({name: Factors(torch.ones(1, inside), torch.ones(out, 1), 1.0)}), **more
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tied_output_layer_is_the_embedding(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The file has one of the two; the loaded model has the same weight as both."""
    folder: Path = request.getfixturevalue(kind)
    base, model = blueprint(folder), load(folder)
    assert "lm_head.weight" not in base.shapes
    weight = model.lm_head.weight
    assert torch.equal(base_weight(one("lm_head", *weight.shape), "lm_head", base), weight)
    rows, width = weight.shape
    for wrong in ({"tie_word_embeddings": False}, {"vocab_size": rows + 1}):
        other = replace(base, config={**base.config, **wrong})
        with pytest.raises(UserError, match="no weight of 'lm_head'"):
            base_weight(one("lm_head", rows, width), "lm_head", other)


@pytest.mark.parametrize("flag", [False, True])
def test_conv1d_and_linear_side_by_side_are_each_read_their_way(gpt2: Path, flag: bool) -> None:
    """fan_in_fan_out is one word for all; c_proj of the attention is square."""
    base, model = blueprint(gpt2), load(gpt2)
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj", "lm_head"):
        module = model.get_submodule(name)
        wanted = layout_of(module).matrix(module.weight)
        made = one(name, *wanted.shape, transposed=flag)
        assert torch.equal(base_weight(made, name, base), wanted)


def test_a_square_weight_of_an_unknown_model_is_read_as_the_adapter_says(gpt2: Path) -> None:
    base = replace(blueprint(gpt2), config={})
    name = "transformer.h.0.attn.c_proj"
    flat, turned = (base_weight(one(name, 32, 32, transposed=t), name, base) for t in (False, True))
    assert torch.equal(flat.T, turned)
