"""llama.cpp's names by gguf's own map, and its rotary rows by the attention that they give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from rankwise.errors import ArtifactError
from rankwise.io.blueprint import blueprint
from rankwise.io.gguf_names import half_split, heads_of, interleaved, named_here, named_there, tied

INNER = (
    *(f"self_attn.{n}_proj" for n in "qkvo"),
    *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
)
NAMES = (
    *(f"model.layers.{i}.{n}" for i in (0, 11) for n in INNER),
    "model.embed_tokens",
    "lm_head",
)


@pytest.mark.parametrize("architecture", ["LLAMA", "QWEN2", "QWEN3"])
def test_the_names_are_those_of_the_package(architecture: str):
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), 12)
    assert [named_there(name) for name in NAMES] == [known.get_name(name) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back(name: str):
    there = named_there(name)
    assert there is not None
    front, _, last = there.rpartition(".")
    assert named_here(front.removeprefix("blk.") or None, last) == name


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.1.up_proj", "score", "layers.x.mlp.up_proj", "a.b.c", ""]
)
def test_other_names_are_not_known(name: str):
    assert named_there(name) is None


def test_a_model_without_its_outer_class_is_known():
    assert named_there("layers.3.mlp.up_proj") == "blk.3.ffn_up"
    assert named_there("embed_tokens") == "token_embd"


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """transformers' rotary embedding: number i turns with number i + d/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """llama.cpp's rotary embedding for Llama: number 2i turns with number 2i + 1."""
    a, b = x[..., ::2], x[..., 1::2]
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return torch.stack(turned, dim=-1).flatten(-2)


def test_rotary_rows_give_the_same_attention():
    x, angles = torch.randn(6, 5), torch.rand(6, 1, 4)
    q, k = torch.randn(32, 5), torch.randn(16, 5)  # 4 query heads and 2 key heads of 8

    def scores(q: Tensor, k: Tensor, rotate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        turned_q = rotate((x @ q.mT).reshape(6, 4, 8), angles)
        turned_k = rotate((x @ k.mT).reshape(6, 2, 8), angles)
        return torch.einsum("thd,shd->hts", turned_q, turned_k.repeat_interleave(2, dim=1))

    there = interleaved("q", q, 4), interleaved("k", k, 2)
    torch.testing.assert_close(
        scores(*there, rotate_pairs), scores(q, k, rotate_halves), rtol=1e-4, atol=1e-4
    )
    assert not torch.equal(there[0], q)
    assert torch.equal(half_split("q", there[0], 4), q)
    assert torch.equal(half_split("k", there[1], 2), k)


def test_rows_that_are_no_heads_are_refused():
    for change in (interleaved, half_split):
        with pytest.raises(ArtifactError, match="'q' has 16 rows in B, which are no 3 heads"):
            change("q", torch.ones(16, 2), 3)


def test_only_query_and_key_of_llama_are_turned(tmp_path: Path):
    said = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    base = blueprint(tmp_path)
    q, k, v = (f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    assert [heads_of(n, "llama", base) for n in (q, k, v)] == [4, 2, None]
    assert [heads_of(n, "qwen2", None) for n in (q, k, v)] == [None, None, None]
    assert len(list(tied({"lm_head": "output", v: "blk.0.attn_v"}, base))) == 1
