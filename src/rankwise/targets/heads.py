"""The output layer of a model: which part a task head or the vocabulary projection is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import regex
from torch import nn

from rankwise.targets.places import sites

__all__ = ["Head", "find_head", "is_transformers"]


@dataclass(frozen=True)
class Head:
    """The output layer of a model.

    Attributes:
        names: module names that make up the head; empty when the model has none.
        kind: "classification" (a task head of transformers, fresh unless the checkpoint had it),
            "language-model" (the output embedding, pre-trained) or "output" (the last linear layer
            of any other module, outside every repeated block).
    """

    names: tuple[str, ...]
    kind: str

    def holds(self, name: str) -> bool:
        """Whether a module name is the head or lies inside it."""
        return any(name == head or name.startswith(head + ".") for head in self.names)


def find_head(model: nn.Module) -> Head:
    """The output layer of a model: which part a task head or the vocabulary projection is.

    For a transformers model it is the output embedding, or what hangs beside the base model
    (``base_model_prefix``, or else the children that are models themselves); for any other module
    it is the last Linear that lies outside every numbered block, or directly in a top-level
    Sequential.
    """
    if is_transformers(model):
        return _transformers_head(model)
    last: str | None = None
    for name, site in sites(model).items():
        inner = site.base
        parents = name.split(".")[:-1]
        if isinstance(inner, nn.Linear):
            repeated = any(part.isdigit() for part in parents)
            last = last if repeated or _inside_attention(model, parents) else name
    return Head((last,) if last is not None else (), "output")


def _inside_attention(model: nn.Module, parents: list[str]) -> bool:
    """Whether a Linear belongs to an attention or encoder layer, and so is no output layer."""
    owners = (".".join(parents[: i + 1]) for i in range(len(parents)))
    inner = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return isinstance(model, inner) or any(
        isinstance(model.get_submodule(owner), inner) for owner in owners
    )


def is_transformers(model: nn.Module) -> bool:
    """Whether this is a transformers model, told without importing transformers."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__ == "transformers.modeling_utils"
        for c in type(model).__mro__
    )


def _transformers_head(model: nn.Module) -> Head:
    names = {id(module): name for name, module in model.named_modules()}
    output: object = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(output, nn.Module) and id(output) in names:
        return Head((names[id(output)],), "language-model")
    children = dict(model.named_children())
    prefix = str(model.base_model_prefix)
    bodies = [children[prefix]] if prefix in children else _models(children.values())
    if not bodies or not _has_task(type(model)):
        return Head((), "none")
    held = {id(parameter) for body in bodies for parameter in body.parameters()}
    beside = [n for n, c in children.items() if any(id(p) not in held for p in c.parameters())]
    return Head(tuple(beside), "classification" if beside else "none")


def _models(children: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that are models of transformers themselves, as the towers of CLIP and Whisper are."""
    return [child for child in children if is_transformers(child)]


def _has_task(kind: type[nn.Module]) -> bool:
    """Whether a class is made for a task: a user's own, or one of transformers named ...For...

    The others, such as CLIPTextModelWithProjection, are pre-trained as a whole.
    """
    return not kind.__module__.startswith("transformers.") or bool(
        regex.search("For[A-Z]", kind.__name__)
    )
