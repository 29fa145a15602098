"""W0 of an adapted weight, read from the files of the base alone, one at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rankwise.errors import ArtifactError, UserError, nearest
from rankwise.io.blueprint import Blueprint
from rankwise.io.portable import Portable

__all__ = ["base_weight", "weight_key"]


def base_weight(portable: Portable, name: str, base: Blueprint) -> Tensor:
    """W0 (out, in) of the update of this name, in the dtype of the base's file.

    Raises:
        UserError: the base has no such weight.
        ArtifactError: it has another shape, or the file is damaged.
    """
    module, rows = name, None
    for whole, parts in portable.parts().items():
        if name in parts:
            module, split = whole, portable.split(whole)
            rows = split, name.rpartition(".")[2]
    stored = base.fetch(weight_key(module, base.shapes, base.where))
    matrix = stored.mT if portable.transposed or module in portable.embeddings else stored
    matrix = matrix.reshape(len(matrix), -1)
    if rows is not None:
        split, part = rows
        matrix = matrix[list(split.rows(len(matrix))[part])]
    factors = portable.factors[name]
    wanted = factors.out_features, factors.in_features
    if tuple(matrix.shape) != wanted:
        raise ArtifactError(
            f"'{name}' is {tuple(matrix.shape)} in {base.where} and {wanted} in the adapter, so "
            "this is not the base that the adapter was trained on."
        )
    return matrix


def weight_key(module: str, shapes: Mapping[str, tuple[int, ...]], where: str) -> str:
    """The name of a module's weight in the files of a base.

    A model for a task holds the base under a name of its own (``bert.encoder...`` where the file
    has ``encoder...``), so the longest end of the name that is there counts; a file may also have
    more in front, where only one name ends so.

    Raises:
        UserError: there is none; the message has the nearest.
    """
    words = module.split(".")
    for first in range(len(words)):
        key = ".".join([*words[first:], "weight"])
        if key in shapes and first < len(words) - 1:
            return key
    key = f"{module}.weight"
    if key in shapes:
        return key
    longer = [name for name in shapes if name.endswith(f".{key}")]
    if len(longer) == 1:
        return longer[0]
    raise UserError(
        f"There is no weight of '{module}' in {where}, so this is not the base that the adapter "
        f"was trained on.{nearest(key, shapes)}"
    )
