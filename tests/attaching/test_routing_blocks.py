"""Blocks of using_rows: heads by row, what ends with them, what nests in them, what is refused."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from counting import walked
from mixed import (
    IDS,
    MIXED,
    NAMES,
    Methods,
    Pair,
    agree,
    alone,
    headed,
    lora,
    lora_pair,
    move,
    several,
)
from rankwise.errors import UserError
from zoo import Zoo

# --- heads ---------------------------------------------------------------------------------------


def test_each_row_has_the_head_of_its_adapter_and_a_bare_row_the_bases():
    model = Pair()
    before, head = model(x := torch.randn(6, 6, dtype=torch.float64)), model.head
    several(headed, model)
    rw.set_active(model, "b")
    hung, keys = model.head, list(model.state_dict())
    with rw.using_rows(model, MIXED):
        y = model(x)
        agree(y, alone(model, MIXED, x))
        agree(y[2], before[2])
        held = {id(p) for p in model.parameters()}
        copies = [r.copies["head"] for r in rw.attachments(model).values()]
        assert all(id(p) in held for copy in (head, *copies) for p in copy.parameters())
        with rw.using_rows(model, ["a"] * 6):
            assert model.head is copies[0]
        assert model.head.training
        assert not model.eval().head.training
    assert model.head is hung
    assert not hung.training
    assert list(model.state_dict()) == keys


def test_heads_of_different_widths_are_no_rows_of_one_batch():
    model = Pair()
    several(headed, model)
    rw.set_active(model, "b")
    wide = rw.attachment(model, "b").copies["head"]
    wide.weight, wide.bias = nn.Parameter(torch.ones(5, 8).double()), None
    x = torch.randn(2, 6, dtype=torch.float64)
    with (
        pytest.raises(UserError, match=r"copies of Linear give outputs of different sizes.*1, 5"),
        rw.using_rows(model, ["a", "b"]),
    ):
        model(x)
    with rw.using_rows(model, ["b", "b"]):
        assert model(x).shape == (2, 5)


def test_an_adapter_without_a_head_leaves_its_rows_the_bases():
    model, x = Pair(), torch.randn(3, 6, dtype=torch.float64)
    rw.attach(model, headed(1), name="a")
    rw.attach(model, lora_pair(2), name="b")
    rw.attach(model, rw.HeadOnly(), name="c")
    move(model)
    with rw.using_rows(model, ["c", "b", "a"]):
        agree(model(x), alone(model, ["c", "b", "a"], x))


# --- the block -----------------------------------------------------------------------------------


def test_it_ends_with_the_block_whatever_happens_there():
    model, x = several(headed, Pair()), torch.randn(3, 6, dtype=torch.float64)
    rw.set_active(model, "c")
    before = model(x)
    with contextlib.suppress(KeyError), rw.using_rows(model, ["a", "b", None]):
        assert not torch.equal(model(x), before)
        raise KeyError
    assert torch.equal(model(x), before)
    assert {n: r.active for n, r in rw.attachments(model).items()} == {
        "a": False,
        "b": False,
        "c": True,
    }
    with pytest.raises(UserError), rw.using_rows(model, ["a", "x"]):
        pass
    assert torch.equal(model(x), before)


def test_other_blocks_inside_take_over_and_give_back():
    model, x = several(headed, Pair()), torch.randn(3, 6, dtype=torch.float64)
    inner, outer = ["c", "a", "b"], ["a", None, "b"]
    with rw.using_rows(model, outer):
        agree(model(x), alone(model, outer, x))  # which is of blocks of using
        with rw.using_rows(model, inner):
            agree(model(x), alone(model, inner, x))
        with rw.using(model):
            agree(model(x), alone(model, [None] * 3, x))
            with rw.using_rows(model, inner):
                agree(model(x), alone(model, inner, x))
        agree(model(x), alone(model, outer, x))
        with rw.base(model):  # which leaves trained heads in their places
            heads = [rw.attachment(model, n).copies["head"] if n else model.head for n in outer]
            inside = torch.tanh(model.values(torch.tanh(model.keys(x))))
            y = model(x)
        for i in (0, 2):
            agree(y[i], heads[i](inside[i]))
        agree(model(x), alone(model, outer, x))


def test_what_is_for_all_rows_is_refused_inside():
    model = several(lora_pair, Pair())
    verbs: list[Callable[[], object]] = [
        lambda: rw.set_active(model, "a"),
        lambda: rw.attach(model, lora_pair(1), name="d"),
        lambda: rw.detach(model, "a"),
        lambda: rw.merge(model),
        lambda: rw.effects(model, torch.ones(3, 6).double()),
    ]
    with rw.using_rows(model, ["a", "b", None]):
        for verb in verbs:
            with pytest.raises(UserError, match=r"outside of the block of rankwise\.using_rows"):
                verb()
        rw.set_trainable(model, "a")
        adapter = rw.adapter_of(model, "a")
    assert adapter.factors
    assert list(rw.attachments(model)) == list(NAMES)


def test_what_is_saved_inside_is_what_is_saved_outside(tmp_path: Path):
    model = several(headed, Pair())
    outside = rw.save_adapter(model, tmp_path / "outside", name="b")
    with rw.using_rows(model, ["a", "b", None]):
        inside = rw.save_adapter(model, tmp_path / "inside", name="b")
    files = sorted(file.name for file in outside.iterdir())
    assert files
    assert all((inside / f).read_bytes() == (outside / f).read_bytes() for f in files)


def test_entering_touches_no_layer():
    model = several(lora)
    with walked() as steps:
        for _ in range(3):
            with rw.using_rows(model, MIXED):
                pass
    assert steps[0] == 0


# --- what is refused -----------------------------------------------------------------------------


def test_wrong_names_are_told_together():
    model = several(headed, Pair())
    with (
        pytest.raises(UserError) as caught,
        rw.using_rows(model, ["a", "bb", None, "zebra", ("a", "b")]),
    ):
        pass
    message = str(caught.value)
    assert "no adapter named 'bb'; the model carries a, b, c. Did you mean 'b'?" in message
    assert "no adapter named 'zebra'" in message
    assert "'a' and 'b' both have their own trained copy of 'head'" in message
    for names in ("aab", []):
        with (
            pytest.raises(UserError, match="one adapter's name, or None, for each row"),
            rw.using_rows(model, names),
        ):
            pass
    with pytest.raises(UserError, match="carries no adapter"), rw.using_rows(Pair(), ["a"]):
        pass
    rw.detach(model)
    rw.attach(model, lora_pair(1))
    with rw.merged(model), pytest.raises(UserError, match=r"merged; call rankwise\.unmerge"):
        rw.using_rows(model, ["default"]).__enter__()
    rw.detach(model)
    rw.attach(model, rw.Full())
    with pytest.raises(UserError, match="Full trains the base itself"):
        rw.using_rows(model, [None]).__enter__()


@pytest.mark.parametrize(
    "target", ["packed.q_proj", "packed.out_proj", "apart.k_proj", "experts.up_proj"]
)
def test_weights_that_their_owner_reads_are_refused_at_once(target: str):
    model = Zoo().requires_grad_(False)
    rw.attach(model, lora(1, target_modules=[target, "keys"]), name="a")
    rw.attach(model, lora(1), name="b")
    with pytest.raises(UserError, match=f"'a' acts on whole batches alone at '{target}'"):
        rw.using_rows(model, ["a", "b"]).__enter__()
    with rw.using_rows(model, ["b", None]):
        model(IDS[:2])


def test_layers_of_torch_that_have_the_batch_second_are_refused():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=False))
    rw.attach(model, rw.LoRA(r=1, target_modules=["linear1"], head="freeze"), name="a")
    with pytest.raises(UserError, match=r"'a' acts on whole batches alone at '0\.linear1'"):
        rw.using_rows(model, ["a", None]).__enter__()


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((4, 6), r"of weight \(8, 6\) was given an input of shape \(4, 6\).*the 3 rows"),
        ((6,), r"shape \(6,\)"),
        ((6, 3, 6), r"here the second is that of the 3 rows"),
        ((1, 6), r"shape \(1, 6\)"),
    ],
)
@pytest.mark.parametrize("method", [lora_pair, lambda i: lora_pair(i, dora=True)])
def test_other_rows_than_were_named(shape: tuple[int, ...], why: str, method: Methods):
    model, x = several(method, Pair()), torch.randn(*shape, dtype=torch.float64)
    with pytest.raises(UserError, match=why), rw.using_rows(model, ["a", "b", None]):
        model(x)


def test_a_weight_that_differs_by_row_is_shown_and_not_computed_with():
    model = several(lora_pair, Pair())
    assert isinstance(model, Pair)
    with rw.using_rows(model, ["a", "b", None]):
        weight = model.keys.weight
        assert (weight.shape, weight.dtype) == ((8, 6), torch.float64)
        assert weight.device == torch.device("cpu")
        with pytest.raises(UserError, match="was read by its owner"):
            nn.functional.linear(torch.ones(3, 6).double(), weight)
    assert type(model.keys.weight) is Tensor
