"""What keeps adapters from being combined is told all at once, with the names and the way out."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import rankwise as rw
from rankwise.errors import UserError
from rankwise.lowrank import Factors
from rankwise.methods.adapter import Adapter, Tokens
from rankwise.methods.combining import combine

Make = Callable[..., Adapter]


def refused(*adapters: Adapter, head: object = None) -> str:
    with pytest.raises(UserError) as caught:
        combine(adapters, head=head)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_dora_magnitude_is_refused_by_name_with_the_reason(make: Make):
    told = refused(make("^body$"), make("^body$", "inner.body", dora=True))
    assert "adapters[1] is DoRA (2 magnitudes: 'body', 'inner.body')" in told
    assert "lengths do not add up as updates do" in told
    assert "adapters[0]" not in told


def test_updates_of_other_shapes_are_refused(make: Make):
    one = make("^body$", "experts.up", bias="adapted", trainable_tokens={"tokens": [1]})
    other = replace(
        one,
        factors={
            "body": Factors(torch.ones(1, 7), torch.ones(6, 1), 1.0),
            "experts.up": Factors(torch.ones(2, 1, 6), torch.ones(2, 6, 1), 1.0),
        },
        biases={"body.bias": torch.ones(5)},
        tokens={"tokens": Tokens((1,), torch.ones(1, 4))},
    )
    told = refused(one, one, other)
    assert "'body' maps 6 to 6 in adapters[0] and maps 7 to 6 in adapters[2]" in told
    assert "'experts.up' is a bank of 3 that maps 6 to 6 in adapters[0]" in told
    assert "the bias 'body.bias' has 6 numbers in adapters[0] and has 5 numbers" in told
    assert "the token rows of 'tokens' are of 6 numbers in adapters[0] and are of 4" in told
    assert "adapters[1]" not in told


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_where_they_stand(make: Make, value: float):
    one = make("^body$", bias="adapted", trainable_tokens={"tokens": [1]})
    factors = one.factors["body"]
    A = factors.A.clone()
    A[0, 0] = value
    broken = replace(one, factors={"body": replace(factors, A=A)})
    assert "'body' of adapters[1] holds NaN or infinity" in refused(one, broken)
    start = replace(factors, A0=A, B0=factors.B)
    assert "'body' of adapters[0]" in refused(replace(one, factors={"body": start}))
    assert "'body.bias' of adapters[0]" in refused(
        replace(one, biases={"body.bias": torch.full((6,), value)})
    )
    assert "'tokens' of adapters[0]" in refused(
        replace(one, tokens={"tokens": Tokens((1,), torch.full((1, 6), value))})
    )


def test_a_whole_and_its_part_are_refused(make: Make):
    told = refused(make("fused.left"), make("fused"))
    assert "'fused' is adapted as a whole in adapters[1] and in its part 'fused.left'" in told


def test_two_ways_to_split_one_weight_are_refused(make: Make):
    one = make("fused.left")
    sizes = rw.Split(("left", "right"), sizes=(4, 8))
    told = refused(one, replace(one, method=replace(one.method, split={"fused": sizes})))
    assert "'fused' is split differently in adapters[0] and adapters[1]" in told


def test_tied_and_untied_updates_are_refused(make: Make):
    one = make("^body$")
    tied = replace(one, method=replace(one.method, tied=True))
    told = refused(one, tied)
    assert "adapters[1] puts its updates on tied modules as well (tied=True)" in told
    assert combine([tied, tied]).adapter.method.tied


def test_a_module_trained_whole_in_one_and_adapted_in_another_is_refused(make: Make):
    one, two = make("^body$", head="train"), make("head", "^body$")
    told = refused(one, two)
    assert "'head' is kept as it was trained whole" in told
    assert "adapters[1] has an update for 'head'" in told
    inside = make("inner.body", bias="adapted")
    outer = replace(one, modules=("inner",), trained={"inner.body.weight": torch.ones(6, 6)})
    told = refused(outer, inside)
    assert "'inner' is kept as it was trained whole, and adapters[1]" in told
    assert "'inner.body.bias'" in told
    rows = make("^body$", trainable_tokens={"tokens": [1]})
    assert "for 'tokens'" in refused(make("^body$", modules_to_save=["tokens"]), rows)


def test_a_head_that_is_not_kept_hinders_nobody(make: Make):
    one, two = make("^body$", head="train"), make("head", modules_to_save=["norm"])
    assert "'head' is kept" in refused(one, two, head=0)
    assert set(combine([one, two], head=1).adapter.factors) == {"body", "head"}


def test_modules_of_which_one_holds_the_other_are_rivals(make: Make):
    one = make("^body$", modules_to_save=["inner.body"])
    whole = replace(one, modules=("inner",), trained={"inner.body.weight": torch.ones(6, 6)})
    told = refused(one, whole)
    assert "'inner', which holds 'inner.body', was trained whole in adapters[1]" in told
    assert combine([one, whole], head=1).adapter.modules == ("inner",)
    fewer = replace(whole, modules=("inner",), trained={})
    assert "'inner' was trained whole in adapters[0] and in adapters[1]" in refused(whole, fewer)
    assert "'inner' was trained whole in adapters[0] and in adapters[1]" in refused(fewer, whole)
    both = replace(whole, modules=("inner", "inner.body"))
    assert combine([both, both]).adapter.modules == ("inner", "inner.body")


@pytest.mark.parametrize("head", [-1, 2, True, "0", 0.0])
def test_a_head_that_is_no_number_of_an_adapter_is_refused(make: Make, head: object):
    one = make("^body$", head="train")
    assert "head must be the number of an adapter, 0 to 1" in refused(one, one, head=head)


def test_a_head_that_is_not_there_is_refused(make: Make):
    told = refused(make("^body$"), make("^body$", head="train"), head=0)
    assert "head is to be that of adapters[0], which has no module that was trained whole" in told


def test_everything_wrong_is_told_at_once(make: Make):
    told = refused(make("^body$", dora=True), make("^body$", head="train"), make("^body$"), head=2)
    assert told.count("\n  - ") == 2
    assert "DoRA" in told
    assert "head is to be that of adapters[2]" in told


def test_messages_call_the_adapters_as_they_were_called(make: Make):
    one = make("^body$")
    broken = {"body": replace(one.factors["body"], A=torch.full((2, 6), float("nan")))}
    two = replace(one, factors=broken)
    with pytest.raises(UserError, match="There are 1 names for 2 adapters"):
        combine([one, two], names=["the English one"])
    with pytest.raises(UserError, match="'body' of the French one holds NaN"):
        combine([one, two], names=["the English one", "the French one"])
