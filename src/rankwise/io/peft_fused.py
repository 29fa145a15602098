"""Fused projections in a PEFT file: parts of one matrix, and attention as PEFT adapts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.io.peft_forms import A_KEY, B_KEY, Form, Packed, Rows, Wanted
from rankwise.layers import Layout
from rankwise.lowrank import Factors

__all__ = ["OUT", "Attention", "Projection"]

OUT = "base_layer.out_proj."  # where the update of an attention's output projection is
TWICE = 2.0  # how often PEFT 0.21 adds that update


@dataclass(frozen=True)
class Projection(Form):
    """Parts of a fused projection, which PEFT sees as one update of the whole (width, in).

    The parts' A lie below each other (equal ones once) and their B in the rows of the part.
    """

    width: int = 0

    def wanted(self, r: int) -> dict[str, Wanted]:
        layout = next(iter(self.places.values()))
        return {A_KEY: Wanted((r, layout.in_features), 0), B_KEY: Wanted((self.width, r), 1)}

    @property
    def outputs(self) -> int:
        return self.width

    def pack(self, pieces: Mapping[str, Factors]) -> Packed:
        scale = next(iter(pieces.values())).scale
        down, up, rows = _stacked(pieces, self.places, self.width, scale)
        return Packed(down.shape[0], scale, {A_KEY: down, B_KEY: up}, rows)

    def unpack(
        self, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], ratios: Mapping[str, float]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return _taken_apart(tensors[A_KEY], tensors[B_KEY], self.places, rows, ratios)


@dataclass(frozen=True)
class Attention(Form):
    """nn.MultiheadAttention: PEFT has one update of in_proj (3E, E) and one of out_proj, of one r.

    What is not adapted has zero factors. PEFT adds the update of out_proj two times (seen in
    0.21.2), so that its B is halved in the file.

    Attributes:
        output: the name of the output projection.
        size: E.
    """

    output: str = ""
    size: int = 0

    def wanted(self, r: int) -> dict[str, Wanted]:
        return {
            A_KEY: Wanted((r, self.size), 0),
            B_KEY: Wanted((3 * self.size, r), 1),
            OUT + A_KEY: Wanted((r, self.size), 0),
            OUT + B_KEY: Wanted((self.size, r), 1),
        }

    def pack(self, pieces: Mapping[str, Factors]) -> Packed:
        first = next(iter(pieces.values()))
        parts = {name: piece for name, piece in pieces.items() if name != self.output}
        down, up = first.A.new_zeros(0, self.size), first.B.new_zeros(3 * self.size, 0)
        rows: dict[str, Rows] = {}
        if parts:
            down, up, rows = _stacked(parts, self.places, 3 * self.size, first.scale)
        out_down, out_up = first.A.new_zeros(0, self.size), first.B.new_zeros(self.size, 0)
        if self.output in pieces:
            piece = pieces[self.output]
            rows[self.output] = (0, piece.r)
            out_down, out_up = piece.A, _folded(piece.B, piece.scale / first.scale / TWICE)
        rank = max(down.shape[0], out_down.shape[0])
        tensors = {
            A_KEY: _taller(down, rank),
            B_KEY: _wider(up, rank),
            OUT + A_KEY: _taller(out_down, rank),
            OUT + B_KEY: _wider(out_up, rank),
        }
        return Packed(rank, first.scale, tensors, rows)

    def unpack(
        self, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], ratios: Mapping[str, float]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        parts = {name: layout for name, layout in self.places.items() if name != self.output}
        found = _taken_apart(tensors[A_KEY], tensors[B_KEY], parts, rows, ratios)
        if self.output in self.places:
            down, up = tensors[OUT + A_KEY], tensors[OUT + B_KEY]
            low, high = rows.get(self.output, (0, down.shape[0]))
            ratio = ratios.get(self.output, 1.0) / TWICE
            found[self.output] = (down[low:high], _unfolded(up[:, low:high], ratio, down))
        return found


def _folded(B: Tensor, ratio: float) -> Tensor:
    """B · ratio, in float64 where B's own dtype would round it: :func:`_unfolded` is then exact."""
    if ratio == 1:
        return B
    wide = B.double() * ratio
    narrow = wide.to(B.dtype)
    return narrow if torch.equal(narrow.double(), wide) else wide


def _unfolded(B: Tensor, ratio: float, A: Tensor) -> Tensor:
    """B / ratio; float64 that :func:`_folded` made becomes A's dtype again."""
    dtype = A.dtype if B.dtype == torch.float64 else B.dtype
    return B.to(dtype) if ratio == 1 else (B.double() / ratio).to(dtype)


def _stacked(
    pieces: Mapping[str, Factors], places: Mapping[str, Layout], width: int, scale: float
) -> tuple[Tensor, Tensor, dict[str, Rows]]:
    """A of all parts and B of all outputs, and which rows of A are those of each part."""
    downs: list[Tensor] = []
    rows: dict[str, Rows] = {}
    height = 0
    for name, piece in pieces.items():
        twin = next((n for n in rows if torch.equal(pieces[n].A, piece.A)), None)
        if twin is not None:
            rows[name] = rows[twin]
            continue
        downs.append(piece.A)
        rows[name] = (height, height + piece.r)
        height += piece.r
    ups = {n: _folded(piece.B, piece.scale / scale) for n, piece in pieces.items()}
    wide = any(up.dtype == torch.float64 for up in ups.values())
    first = next(iter(pieces.values())).B
    up = torch.zeros(width, height, dtype=torch.float64 if wide else first.dtype)
    for name, (low, high) in rows.items():
        up[_index(places[name], width), low:high] = ups[name].to(up.dtype)
    return torch.cat(downs), up, rows


def _taken_apart(
    down: Tensor,
    up: Tensor,
    places: Mapping[str, Layout],
    rows: Mapping[str, Rows],
    ratios: Mapping[str, float],
) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layout in places.items():
        low, high = rows.get(name, (0, down.shape[0]))
        part = up[_index(layout, up.shape[0]), low:high]
        ratio = ratios.get(name, 1.0)
        found[name] = (down[low:high].clone(), _unfolded(part, ratio, down))
    return found


def _index(layout: Layout, width: int) -> Tensor:
    return torch.tensor(layout.rows if layout.rows is not None else range(width))


def _taller(A: Tensor, rank: int) -> Tensor:
    return F.pad(A, (0, 0, 0, rank - A.shape[0]))


def _wider(B: Tensor, rank: int) -> Tensor:
    return F.pad(B, (0, rank - B.shape[1]))
