"""The shapes that PEFT gives an update: one form for each kind of weight, there and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.layers import Layout
from rankwise.lowrank import Factors

__all__ = [
    "A_KEY",
    "B_KEY",
    "ROWS_KEYS",
    "Convolution",
    "Form",
    "Linear",
    "Packed",
    "Parameter",
    "Plain",
    "Rows",
    "Wanted",
]

Rows = tuple[int, int]
A_KEY, B_KEY = "lora_A.weight", "lora_B.weight"
ROWS_KEYS = ("lora_embedding_A", "lora_embedding_B")  # of an embedding


@dataclass(frozen=True)
class Wanted:
    """The shape that one tensor of a file must have.

    Attributes:
        shape: for the rank that the configuration says.
        axis: which of its dimensions goes with the rank.
        each: how long that dimension is for rank 1; a convolution with groups has less than 1.
    """

    shape: tuple[int, ...]
    axis: int
    each: float = 1.0


@dataclass(frozen=True)
class Packed:
    """What a form makes of one or more updates.

    Attributes:
        r: the rank that PEFT is told.
        scale: the s that PEFT is told.
        tensors: by key, behind the form's path.
        rows: which rows of A are those of each name.
    """

    r: int
    scale: float
    tensors: Mapping[str, Tensor]
    rows: Mapping[str, Rows]


@dataclass(frozen=True)
class Form(ABC):
    """How PEFT holds the updates of one weight.

    Attributes:
        target: what the configuration calls it: a module, or a parameter.
        path: where its tensors are in the file, without the prefix of all names.
        places: what it adapts: the weights by the names that Rankwise gives them.
    """

    target: str
    path: str
    places: Mapping[str, Layout]

    @abstractmethod
    def wanted(self, r: int) -> dict[str, Wanted]:
        """The tensors of an update of this rank, by key."""

    @abstractmethod
    def pack(self, pieces: Mapping[str, Factors]) -> Packed:
        """The tensors for these updates without starts; those of a form share one scale."""

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], ratios: Mapping[str, float]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each name; the inverse of :meth:`pack`.

        ``rows`` are those of :class:`Packed`, empty in a file of PEFT, where each name has all;
        ``ratios`` is the scale of each name in terms of the form's.
        """

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why tensors of the right shapes fit no weight of the layer, or None."""
        return None

    @property
    def outputs(self) -> int:
        """Outputs of the whole layer."""
        return next(iter(self.places.values())).out_features

    def magnitude(self) -> tuple[int, ...]:
        """The shape of DoRA's magnitude."""
        return (self.outputs,)


@dataclass(frozen=True)
class Linear(Form):
    """nn.Linear and transformers' Conv1D, A (r, in) and B (out, r); an embedding by other names."""

    embedding: bool = False

    def wanted(self, r: int) -> dict[str, Wanted]:
        ((_, layout),) = self.places.items()
        a, b = self._keys()
        return {
            a: Wanted((r, layout.in_features), 0),
            b: Wanted((layout.out_features, r), 1),
        }

    def pack(self, pieces: Mapping[str, Factors]) -> Packed:
        ((name, piece),) = pieces.items()
        a, b = self._keys()
        return Packed(piece.r, piece.scale, {a: piece.A, b: piece.B}, {name: (0, piece.r)})

    def unpack(
        self, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], ratios: Mapping[str, float]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        a, b = self._keys()
        return dict.fromkeys(self.places, (tensors[a], tensors[b]))

    def _keys(self) -> tuple[str, str]:
        return ROWS_KEYS if self.embedding else (A_KEY, B_KEY)


@dataclass(frozen=True)
class Plain(Linear):
    """What PEFT has no form for: the factors as they are, a bank with E in front."""

    def wanted(self, r: int) -> dict[str, Wanted]:
        ((_, layout),) = self.places.items()
        bank = () if layout.experts is None else (layout.experts,)
        return {
            A_KEY: Wanted((*bank, r, layout.in_features), len(bank)),
            B_KEY: Wanted((*bank, layout.out_features, r), 1 + len(bank)),
        }

    def magnitude(self) -> tuple[int, ...]:
        ((_, layout),) = self.places.items()
        return (layout.out_features,) if layout.experts is None else (layout.experts, self.outputs)


@dataclass(frozen=True)
class Convolution(Form):
    """A convolution: A (r, in, *k) and B (out, r, 1...), in PEFT's own words.

    With G groups PEFT reads all channels by A, of rank R, and lets each group of outputs use R/G
    rows of it. An update of the grouped weight is then R = G·r, where the rows of group g hold the
    same A at the channels of group g and zeros elsewhere.
    """

    groups: int = 1

    def wanted(self, r: int) -> dict[str, Wanted]:
        out, narrow, *kernel = self._layout.shape
        ones = (1,) * len(kernel)
        return {
            A_KEY: Wanted((r, narrow * self.groups, *kernel), 0),
            B_KEY: Wanted((out, r // self.groups, *ones), 1, 1 / self.groups),
        }

    def magnitude(self) -> tuple[int, ...]:
        out, _, *kernel = self._layout.shape
        return (1, out, *(1 for _ in kernel))

    def pack(self, pieces: Mapping[str, Factors]) -> Packed:
        ((name, piece),) = pieces.items()
        out, narrow, *kernel = self._layout.shape
        rank = self.groups * piece.r
        down = piece.A.new_zeros(self.groups, piece.r, self.groups, narrow, *kernel)
        for group in range(self.groups):
            down[group, :, group] = piece.A.reshape(piece.r, narrow, *kernel)
        tensors = {
            A_KEY: down.view(rank, narrow * self.groups, *kernel),
            B_KEY: piece.B.reshape(out, piece.r, *(1 for _ in kernel)),
        }
        return Packed(rank, piece.scale, tensors, {name: (0, piece.r)})

    def unpack(
        self, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], ratios: Mapping[str, float]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        ((name, layout),) = self.places.items()
        blocks = self._blocks(tensors[A_KEY])
        down = torch.stack([blocks[g, :, g] for g in range(self.groups)]).flatten(2)
        up = tensors[B_KEY].reshape(layout.out_features, -1)
        if all(torch.equal(down[0], each) for each in down[1:]):
            return {name: (down[0].clone(), up)}
        return {name: (down.flatten(0, 1), torch.block_diag(*up.chunk(self.groups)))}

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        if self.groups == 1:
            return None
        blocks = self._blocks(tensors[A_KEY])
        across = [blocks[g, :, h] for g in range(self.groups) for h in range(self.groups) if g != h]
        if not any(bool(part.any()) for part in across):
            return None
        return (
            f"is dense over the channels of a convolution with {self.groups} groups, whose weight "
            "has room for none but those of its own group: no weight of the layer has this update, "
            "which PEFT cannot merge either. Train it anew."
        )

    @property
    def _layout(self) -> Layout:
        ((_, layout),) = self.places.items()
        return layout

    def _blocks(self, down: Tensor) -> Tensor:
        """A as (group of the rows, row, group of the channels, channel, *k)."""
        _, narrow, *kernel = self._layout.shape
        return down.reshape(self.groups, -1, self.groups, narrow, *kernel)


@dataclass(frozen=True)
class Parameter(Form):
    """A parameter without a layer: A (E·r, in) expert by expert, B (out, r·E) with E the fastest.

    ``turned`` is a layer's weight that is stored as (in, out): PEFT's factors are those of the
    stored matrix, so each is the other one's transpose.
    """

    turned: bool = False

    def wanted(self, r: int) -> dict[str, Wanted]:
        ((_, layout),) = self.places.items()
        experts = layout.experts or 1
        sides = (layout.out_features, layout.in_features)
        out, narrow = sides[::-1] if self.turned else sides
        return {
            A_KEY: Wanted((experts * r, narrow), 0, experts),
            B_KEY: Wanted((out, r * experts), 1, experts),
        }

    def pack(self, pieces: Mapping[str, Factors]) -> Packed:
        ((name, piece),) = pieces.items()
        A, B = piece.A, piece.B
        if piece.bank is not None:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        return Packed(piece.r, piece.scale, {A_KEY: A, B_KEY: B}, {name: (0, piece.r)})

    def unpack(
        self, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], ratios: Mapping[str, float]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        ((name, layout),) = self.places.items()
        A, B = tensors[A_KEY], tensors[B_KEY]
        if layout.experts is not None:
            A = A.unflatten(0, (layout.experts, -1))
            B = B.unflatten(1, (-1, layout.experts)).permute(2, 0, 1).contiguous()
        return {name: (B.mT.contiguous(), A.mT.contiguous()) if self.turned else (A, B)}
