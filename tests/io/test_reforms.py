"""Folding, padding and joining leave every update what it was, to the last bit they can."""

from __future__ import annotations

import pytest
import torch

from foreign import deltas, same_deltas
from rankwise.errors import UserError
from rankwise.io.portable import Portable, assemble
from rankwise.io.reforms import fold, join_parts, one_alpha, one_rank, one_scale, without_starts
from rankwise.layers import Split
from rankwise.lowrank import Factors


def factors(r: int, scale: float, rows: int = 6, start: int | None = None) -> Factors:
    a0 = None if start is None else torch.randn(start, 5)
    b0 = None if start is None else torch.randn(rows, start)
    return Factors(torch.randn(r, 5), torch.randn(rows, r), scale, a0, b0)


def made(**updates: Factors) -> Portable:
    return Portable(assemble({f"layer.{name}": f for name, f in updates.items()}))


def test_the_method_gives_each_name_its_rank_and_scale():
    portable = made(q=factors(2, 2.0), k=factors(2, 2.0), v=factors(3, 0.5), o=factors(2, 7.0))
    method = portable.adapter.method
    for name, f in portable.factors.items():
        assert (method.spec(name).r, method.spec(name).scale) == (f.r, pytest.approx(f.scale))
    assert method.r == 2
    assert method.alpha == 4


def test_folding_leaves_scale_one_and_the_same_update():
    portable = made(q=factors(2, 2**0.5), v=factors(3, 16 / 3))
    folded = fold(portable, "because")
    assert {f.scale for f in folded.factors.values()} == {1.0}
    assert same_deltas(portable, folded)
    assert folded.adapter.method.alpha_pattern.keys() == folded.adapter.method.rank_pattern.keys()
    assert folded.notes == (
        "fold: the scale 1.41421, 5.33333 went into B in float32, and lora_alpha is r: because",
    )


def test_folding_widens_half_precision_and_rounds_once():
    narrow = Factors(torch.randn(2, 5).bfloat16(), torch.randn(6, 2).bfloat16(), 1 / 3)
    f = fold(made(q=narrow), "x").factors["layer.q"]
    assert f.B.dtype == torch.float32
    assert torch.equal(f.B, (narrow.B.double() / 3).float())


def test_one_alpha_changes_nothing_where_all_agree():
    portable = made(q=factors(2, 8 / 2), v=factors(4, 8 / 4))
    same, alpha = one_alpha(portable, "x")
    assert same is portable
    assert alpha == 8


def test_one_alpha_serves_every_rank():
    portable = made(q=factors(2, 3.0), k=factors(2, 1.0), v=factors(3, 0.25))
    changed, alpha = one_alpha(portable, "x")
    assert alpha == 2
    assert [f.scale for f in changed.factors.values()] == [1.0, 1.0, pytest.approx(2 / 3)]
    assert same_deltas(portable, changed)


def test_one_scale_keeps_a_common_scale_and_folds_others():
    kept, scale = one_scale(made(q=factors(2, 3.0), v=factors(4, 3.0)), "x")
    assert scale == 3.0
    assert kept.notes == ()
    portable = made(q=factors(2, 3.0), v=factors(4, 2.0))
    folded, scale = one_scale(portable, "x")
    assert scale == 1.0
    assert same_deltas(portable, folded)


def test_padding_gives_one_rank_and_the_very_same_update():
    portable = made(q=factors(2, 3.0), v=factors(4, 2.0))
    padded = one_rank(portable, "x")
    assert {f.r for f in padded.factors.values()} == {4}
    assert padded.adapter.method.rank_pattern == {}
    for name, delta in deltas(portable).items():
        assert torch.equal(deltas(padded)[name], delta)


def test_a_start_becomes_its_exact_pair():
    portable = made(q=factors(2, 2.0, start=3), v=factors(2, 2.0))
    plain = without_starts(portable)
    assert [f.r for f in plain.factors.values()] == [5, 2]
    assert all(f.A0 is None for f in plain.factors.values())
    assert same_deltas(portable, plain, 1e-5)
    assert without_starts(plain) is plain


@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 0.5)])
@pytest.mark.parametrize(
    "split",
    [
        Split(("q", "k", "v"), (4, 6, 2)),
        Split(("q", "k", "v"), (4, 6, 2), heads=2),
    ],
)
def test_parts_become_one_update_of_the_whole(split: Split, scales: tuple[float, float]):
    own = {"attn.q": factors(2, scales[0], 4), "attn.v": factors(3, scales[1], 2)}
    portable = Portable(assemble({**own, "other": factors(1, 1.0)}, splits={"attn": split}))
    joined = join_parts(portable)
    assert list(joined.factors) == ["attn", "other"]
    assert joined.factors["attn"].r == 5
    assert joined.adapter.method.split == {}
    dense = joined.factors["attn"].delta()
    for part, rows in split.rows(12).items():
        want = own[f"attn.{part}"].delta() if part != "k" else torch.zeros(6, 5)
        torch.testing.assert_close(dense[list(rows)], want)
    assert join_parts(joined) is joined


def test_parts_with_magnitudes_are_refused():
    split = Split(("q", "k"), (6, 6))
    held = {"attn.q": torch.ones(6)}
    adapter = assemble({"attn.q": factors(2, 1.0)}, splits={"attn": split}, magnitudes=held)
    with pytest.raises(UserError, match=r"'attn\.q' is a part .* DoRA magnitude"):
        join_parts(Portable(adapter))
