"""llama.cpp's names for the layers of Llama and Qwen, and its order of the rotary rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import Blueprint

__all__ = [
    "ARCHITECTURES",
    "half_split",
    "heads_of",
    "interleaved",
    "named_here",
    "named_there",
    "tied",
]

# The architectures whose names are known here, by model_type of transformers.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"embed_tokens": "token_embd", "lm_head": "output"}
_HERE = re.compile(r"(?:model\.)?(?:layers\.(?P<block>\d+)\.(?P<inner>.+)|(?P<outer>\w+))")
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def named_there(name: str) -> str | None:
    """``model.layers.3.self_attn.q_proj`` → ``blk.3.attn_q``, or None."""
    found = _HERE.fullmatch(name)
    if found is None:
        return None
    if found["outer"]:
        return _OUTER.get(found["outer"])
    inner = _BLOCK.get(found["inner"])
    return None if inner is None else f"blk.{int(found['block'])}.{inner}"


def named_here(block: str | None, name: str) -> str | None:
    """The way back, as a causal language model of transformers calls its layers."""
    if block is None:
        outer = next((h for h, t in _OUTER.items() if t == name), None)
        return f"model.{outer}" if outer == "embed_tokens" else outer
    inner = next((h for h, t in _BLOCK.items() if t == name), None)
    return None if inner is None else f"model.layers.{block}.{inner}"


def tied(there: Mapping[str, str | None], base: Blueprint) -> Iterator[str]:
    """Where the base has one weight for embedding and output, llama.cpp has no update of either."""
    if base.config.get("tie_word_embeddings") is not True:
        return
    for name, word in there.items():
        if word in _OUTER.values():
            yield (
                f"'{name}' shares its weight with the other end of the model "
                "(tie_word_embeddings), and llama.cpp then has one tensor for both and stops at an "
                "update of either."
            )


def heads_of(name: str, architecture: str, base: Blueprint | None) -> int | None:
    """How many heads the rows of B belong to, where llama.cpp has these in another order."""
    inner = (named_there(name) or "").rpartition(".")[2]
    if architecture != "llama" or inner not in _HEADS:
        return None
    if base is None:
        raise UserError(
            f"'{name}' is a query or key projection of a Llama model, whose rows GGUF has in "
            "another order by head. Give the base or its config.json (base=, --base)."
        )
    key = _HEADS[inner]
    return base.number(key if key in base.config else "num_attention_heads")


def interleaved(name: str, b: Tensor, heads: int) -> Tensor:
    """Rows of each head from [first half, second half] to pairs, as llama.cpp's RoPE has them."""
    _divisible(name, b, heads)
    return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def half_split(name: str, b: Tensor, heads: int) -> Tensor:
    """The way back of :func:`interleaved`."""
    _divisible(name, b, heads)
    return b.reshape(heads, -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _divisible(name: str, b: Tensor, heads: int) -> None:
    if b.shape[0] % (2 * heads):
        raise ArtifactError(
            f"'{name}' has {b.shape[0]} rows in B, which are no {heads} heads of even size: the "
            "adapter is for another base."
        )
