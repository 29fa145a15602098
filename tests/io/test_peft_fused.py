"""Fused projections in a PEFT file: what is stacked comes apart again, and sums to the same δ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankwise.io.peft_forms import A_KEY, B_KEY
from rankwise.io.peft_fused import OUT, Attention, Projection
from rankwise.layers import Layout, Split, layout_of, layouts
from rankwise.lowrank import Factors

SIZE = 6
MHA = nn.MultiheadAttention(SIZE, 2)
PARTS = {f"m{end}": layout for end, layout in layouts(MHA).items()}
EVERY = {**PARTS, "m.out_proj": layout_of(MHA.out_proj)}


def piece(layout: Layout, r: int, scale: float, dtype: torch.dtype = torch.float32) -> Factors:
    A = torch.randn(r, layout.in_features, dtype=dtype)
    return Factors(A, torch.randn(layout.out_features, r, dtype=dtype), scale)


def attention(names: list[str]) -> Attention:
    places = {name: EVERY[name] for name in names}
    return Attention("m", "m", places, output="m.out_proj", size=SIZE)


def ratios(pieces: dict[str, Factors], scale: float) -> dict[str, float]:
    return {name: each.scale / scale for name, each in pieces.items()}


RANKS = st.dictionaries(st.sampled_from(list(EVERY)), st.integers(1, 4), min_size=1)
SCALES = st.floats(1e-3, 1e3, allow_nan=False)


@given(RANKS, st.data())
def test_an_attention_comes_back_to_the_last_bit(ranks: dict[str, int], data: st.DataObject):
    scales = {name: data.draw(SCALES) for name in ranks}
    pieces = {name: piece(EVERY[name], r, scales[name]) for name, r in ranks.items()}
    form = attention(list(pieces))
    packed = form.pack(pieces)
    wanted = form.wanted(packed.r)
    assert {k: tuple(t.shape) for k, t in packed.tensors.items()} == {
        k: w.shape for k, w in wanted.items()
    }
    back = form.unpack(packed.tensors, packed.rows, ratios(pieces, packed.scale))
    for name, each in pieces.items():
        assert torch.equal(back[name][0], each.A)
        assert torch.equal(back[name][1], each.B)
        assert back[name][1].dtype == each.B.dtype


def test_what_peft_computes_is_the_sum_of_the_parts_and_twice_half_the_output():
    pieces = {
        "m.q_proj": piece(EVERY["m.q_proj"], 2, 1.5),
        "m.v_proj": piece(EVERY["m.v_proj"], 3, 0.7),
        "m.out_proj": piece(EVERY["m.out_proj"], 1, 4.0),
    }
    packed = attention(list(pieces)).pack(pieces)
    tensors = {key: tensor.double() for key, tensor in packed.tensors.items()}
    whole = packed.scale * tensors[B_KEY] @ tensors[A_KEY]
    expected = torch.zeros(3 * SIZE, SIZE, dtype=torch.float64)
    expected[:SIZE] = pieces["m.q_proj"].delta().double()
    expected[2 * SIZE :] = pieces["m.v_proj"].delta().double()
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    out = 2 * packed.scale * tensors[OUT + B_KEY] @ tensors[OUT + A_KEY]
    torch.testing.assert_close(out, pieces["m.out_proj"].delta().double(), rtol=1e-5, atol=1e-5)


def test_a_file_of_peft_gives_each_part_the_whole_of_a():
    form = attention(list(EVERY))
    tensors = {k: torch.randn(*w.shape) for k, w in form.wanted(2).items()}
    found = form.unpack(tensors, {}, {})
    stacked = torch.cat([B @ A for name, (A, B) in found.items() if name != "m.out_proj"])
    torch.testing.assert_close(stacked, tensors[B_KEY] @ tensors[A_KEY])
    A, B = found["m.out_proj"]
    torch.testing.assert_close(B @ A, 2 * tensors[OUT + B_KEY] @ tensors[OUT + A_KEY])
    again = form.pack({name: Factors(*pair, 1.0) for name, pair in found.items()})
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in tensors.items())


def test_a_scale_that_would_round_makes_float64_and_others_do_not():
    form = attention(["m.q_proj", "m.k_proj"])
    even = {n: piece(EVERY[n], 2, s) for n, s in (("m.q_proj", 1.0), ("m.k_proj", 0.25))}
    assert form.pack(even).tensors[B_KEY].dtype == torch.float32
    odd = {n: piece(EVERY[n], 2, s) for n, s in (("m.q_proj", 1.0), ("m.k_proj", 0.3))}
    assert form.pack(odd).tensors[B_KEY].dtype == torch.float64


@pytest.mark.parametrize("heads", [0, 2])
def test_parts_of_a_projection_lie_in_their_rows(heads: int):
    layer = nn.Linear(5, 12)
    split = Split(("a", "b", "c"), heads=heads)
    every = {f"m{end}": layout for end, layout in layouts(layer, split).items() if end}
    places = {name: every[name] for name in ("m.a", "m.c")}
    form = Projection("m", "m", places, width=12)
    pieces = {name: piece(layout, 2, 1.0) for name, layout in places.items()}
    packed = form.pack(pieces)
    delta = packed.tensors[B_KEY] @ packed.tensors[A_KEY]
    for name, layout in every.items():
        rows = delta[torch.tensor(layout.rows)]
        expected = pieces[name].delta() if name in pieces else torch.zeros_like(rows)
        torch.testing.assert_close(rows, expected)
    assert form.magnitude() == (12,)
    back = form.unpack(packed.tensors, packed.rows, {})
    assert all(torch.equal(back[n][1], each.B) for n, each in pieces.items())
