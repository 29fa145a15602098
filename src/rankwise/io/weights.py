"""W0 of an adapted weight, read from the files of the base alone, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from rankwise.errors import ArtifactError, UserError, nearest
from rankwise.io.blueprint import Blueprint
from rankwise.io.portable import Portable

__all__ = ["base_weight", "tensor_key", "weight_key"]


# Whose layers of these names are transformers' Conv1D, stored (in, out), and all others plain.
_TURNED_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_TURNED = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def base_weight(portable: Portable, name: str, base: Blueprint) -> Tensor:
    """W0 (out, in) of the update of this name, in the dtype of the base's file.

    Where an output layer has no weight of its own in the file, because it is tied, it is that of
    the embedding. Whether a weight is stored (in, out) is told by its shape; of a square one by
    the model type where Conv1D is known in it, else by the adapter's fan_in_fan_out.

    Raises:
        UserError: the base has no such weight.
        ArtifactError: it has another shape, or the file is damaged.
    """
    module, rows = name, None
    factors = portable.factors[name]
    outputs, inputs = factors.out_features, factors.in_features
    for whole, parts in portable.parts().items():
        if name in parts:
            module, split = whole, portable.split(whole)
            outputs = sum(split.sizes) if split.sizes else outputs * len(split.names)
            rows = split.rows(outputs)[name.rpartition(".")[2]]
    key = weight_key(module, base.shapes)
    if key is None and (key := _embedding(base, (outputs, inputs))) is None:
        raise UserError(
            f"There is no weight of '{module}' in {base.where}: either this is not the base that "
            "the adapter was trained on, or the weight is another's in a way that the file does "
            f"not tell.{nearest(f'{module}.weight', base.shapes)}"
        )
    stored = base.fetch(key)
    matrix = stored.reshape(len(stored), -1)
    if stored.ndim == 2 and _turned(portable, module, stored, (outputs, inputs), base):
        matrix = stored.mT
    if tuple(matrix.shape) != (outputs, inputs):
        raise ArtifactError(
            f"'{module}' is {tuple(matrix.shape)} in {base.where} and {(outputs, inputs)} in the "
            "adapter, so this is not the base that the adapter was trained on."
        )
    return matrix if rows is None else matrix[list(rows)]


def _turned(
    portable: Portable, module: str, stored: Tensor, wanted: tuple[int, int], base: Blueprint
) -> bool:
    """Whether a weight is stored as the transpose of the layer's matrix."""
    if wanted[0] != wanted[1]:
        return tuple(stored.shape) == wanted[::-1]
    if module in portable.embeddings:
        return True
    if base.config.get("model_type") in _TURNED_TYPES:
        return module.rpartition(".")[2] in _TURNED
    return portable.transposed


def _embedding(base: Blueprint, shape: tuple[int, int]) -> str | None:
    """The embedding that a tied output layer of this shape shares; None where it is not certain."""
    inner = base.config.get("text_config")
    said = {**(cast("dict[str, object]", inner) if isinstance(inner, dict) else {}), **base.config}
    if said.get("tie_word_embeddings") is False or said.get("vocab_size") != shape[0]:
        return None
    found = [key for key, each in base.shapes.items() if each == shape]
    return found[0] if len(found) == 1 else None


def weight_key(module: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The name of a module's weight in the files of a base, None where there is none."""
    return tensor_key(f"{module}.weight", shapes)


def tensor_key(path: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The name that a tensor of a model has in the files of a base, None where it is not there.

    A model for a task holds the base under a name of its own (``bert.encoder...`` where the file
    has ``encoder...``), so the longest end of the name that is there counts; a file may also have
    more in front, where only one name ends so.
    """
    words = path.split(".")
    ends = (".".join(words[first:]) for first in range(max(1, len(words) - 2)))
    if (key := next((end for end in ends if end in shapes), None)) is not None:
        return key
    longer = [name for name in shapes if name.endswith(f".{path}")]
    return longer[0] if len(longer) == 1 else None
