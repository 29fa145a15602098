"""loralib 0.1.2 as a witness: the same numbers, and each of its faults that concerns layers.

Where it fails here and where it works there are two assertions of one test.
"""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import updates_of
from twins import One, relative

loralib = pytest.importorskip("loralib")

R, ALPHA = 2, 6


def adapted(base: nn.Module, **options: object) -> One:
    """The layer in a model, adapted by Rankwise."""
    model = One(base)
    asked = {"r": R, "alpha": ALPHA, "target_modules": ["layer"], "head": "freeze", **options}
    rw.attach(model, rw.LoRA(**asked))  # type: ignore[arg-type]
    return model


def learned(model: nn.Module) -> None:
    """The updates as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def same(theirs: nn.Module, ours: One) -> None:
    """Give ours the base and the factors of a loralib layer."""
    ours.layer.base_layer.load_state_dict(
        {n: p for n, p in theirs.state_dict().items() if "lora_" not in n}
    )
    with torch.no_grad():
        ours.layer.update.lora_A.copy_(theirs.lora_A)
        ours.layer.update.lora_B.copy_(theirs.lora_B)


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_outputs_and_gradients_are_those_of_loralib(kind: str, training: bool):
    if kind == "linear":
        theirs, base = loralib.Linear(12, 9, r=R, lora_alpha=ALPHA), nn.Linear(12, 9)
        x = torch.randn(5, 12, dtype=torch.float64)
    else:
        theirs, base = loralib.Embedding(9, 12, r=R, lora_alpha=ALPHA), nn.Embedding(9, 12)
        x = torch.randint(0, 9, (3, 4))
    theirs, ours = theirs.double(), adapted(base.double())
    learned(theirs)
    same(theirs, ours)
    theirs.train(training)
    ours.train(training)
    assert relative(ours(x), theirs(x)) < 1e-13
    if training:
        for model in (ours, theirs):
            (model(x) ** 2).sum().backward()
        assert relative(ours.layer.update.lora_A.grad, theirs.lora_A.grad) < 1e-13
        assert relative(ours.layer.update.lora_B.grad, theirs.lora_B.grad) < 1e-13


def test_enabled_parts_of_a_merged_linear_are_parts_of_a_fused_projection():
    theirs = loralib.MergedLinear(8, 12, r=R, lora_alpha=ALPHA, enable_lora=[True, False, True])
    theirs = theirs.double()
    learned(theirs)
    parts = ("query", "key", "value")
    ours = adapted(
        nn.Linear(8, 12).double(),
        split={"layer": rw.Split(parts)},
        target_modules=["layer.query", "layer.value"],
    )
    state = {n: p for n, p in theirs.state_dict().items() if "lora_" not in n}
    ours.layer.base_layer.load_state_dict(state)
    updates = updates_of(ours)
    with torch.no_grad():
        for i, name in enumerate(("layer.query", "layer.value")):
            updates[name].lora_A.copy_(theirs.lora_A.chunk(2)[i])
            updates[name].lora_B.copy_(theirs.lora_B.chunk(2)[i])
    x = torch.randn(5, 8, dtype=torch.float64)
    assert relative(ours(x), theirs(x)) < 1e-13
    assert theirs.eval() is None  # nn.Module.eval gives the module back; it has merged now
    assert relative(ours.layer.weight, theirs.weight) < 1e-13
    assert ours.layer.eval() is ours.layer


# --- its faults ----------------------------------------------------------------------------------


CONVOLUTIONS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("Conv1d", lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    ("Conv3d", lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
]


@pytest.mark.parametrize(("name", "make", "shape"), CONVOLUTIONS, ids=["Conv1d", "Conv3d"])
def test_convolutions_of_one_and_three_dimensions_run_and_merge(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]
):
    x = torch.randn(shape)
    theirs = getattr(loralib, name)(4, 6, 3, r=R)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        theirs(x)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        theirs.eval()
    ours = adapted(make())
    learned(ours)
    y = ours(x)
    assert not torch.allclose(y, ours.layer.base_layer(x), atol=1e-2)
    assert rw.merge(ours, probe=x).passed
    torch.testing.assert_close(ours(x), y, rtol=1e-4, atol=1e-5)


def test_a_kernel_need_not_be_square():
    with pytest.raises(AssertionError):
        loralib.Conv2d(4, 6, (3, 2), r=R)
    ours, x = adapted(nn.Conv2d(4, 6, (3, 2))), torch.randn(2, 4, 9, 9)
    learned(ours)
    assert not torch.equal(ours(x), ours.layer.base_layer(x))


def test_the_base_is_in_the_state_once_and_by_its_own_name_when_detached():
    """loralib 0.1.2 renames it; the code on GitHub has it under both names."""
    theirs = loralib.Conv2d(4, 6, 3, r=R)
    assert "weight" not in theirs.state_dict()
    ours = adapted(nn.Conv2d(4, 6, 3))
    pointers = [t.data_ptr() for t in ours.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    rw.detach(ours)
    assert list(ours.state_dict()) == ["layer.weight", "layer.bias"]


def test_a_part_follows_the_model_to_another_device_and_dtype():
    theirs = loralib.MergedLinear(8, 12, r=R, enable_lora=[True, False, True])
    moved = theirs.to("meta")
    assert moved.weight.is_meta
    assert not moved.lora_ind.is_meta  # no buffer: it stays behind
    ours = adapted(
        nn.Linear(8, 12),
        split={"layer": rw.Split(("query", "key", "value"))},
        target_modules=["layer.value"],
    )
    there = ours.to("meta")
    tensors = [*there.parameters(), *there.buffers()]
    assert all(t.is_meta for t in tensors)
    assert there(torch.empty(5, 8, device="meta")).shape == (5, 12)
    assert all(not isinstance(v, Tensor) for m in there.modules() for v in vars(m).values())


def test_a_layer_can_be_pickled_and_saved_whole():
    theirs = loralib.Linear(8, 8, r=R)
    with pytest.raises(AttributeError, match="Can't pickle local object"):
        pickle.dumps(theirs)
    ours, x = adapted(nn.Linear(8, 8), dropout=0.1).eval(), torch.randn(3, 8)
    learned(ours)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), ours(x))


def test_no_part_at_all_is_an_error_when_it_is_asked_for_and_not_when_it_is_run():
    theirs = loralib.MergedLinear(8, 12, r=R, enable_lora=[False, False, False])
    with pytest.raises(AttributeError, match="no attribute 'lora_A'"):
        theirs(torch.randn(3, 8))
    with pytest.raises(rw.UserError, match="target_modules is empty"):
        adapted(nn.Linear(8, 12), target_modules=[])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_evaluating_in_turn_changes_no_bit(dtype: torch.dtype):
    theirs, x = loralib.Linear(128, 128, r=R, lora_alpha=ALPHA).to(dtype), torch.randn(3, 128)
    learned(theirs)
    before = theirs.weight.detach().clone()
    theirs.eval()
    theirs.train()
    assert (theirs.weight != before).float().mean() > 0.01
    ours = adapted(nn.Linear(128, 128).to(dtype))
    learned(ours)
    bits, y = copy.deepcopy(ours.state_dict()), ours(x.to(dtype))
    ours.eval()
    ours.train()
    assert all(torch.equal(t, bits[n]) for n, t in ours.state_dict().items())
    assert torch.equal(ours(x.to(dtype)), y)
    with rw.merged(ours):
        assert type(ours.layer) is nn.Linear
    assert torch.equal(ours(x.to(dtype)), y)


def test_an_owner_that_reads_the_weight_in_training_gets_the_update():
    """loralib's weight tells the truth in evaluation only."""
    theirs = loralib.Linear(8, 8, r=R, lora_alpha=ALPHA)
    ours = adapted(nn.Linear(8, 8))
    learned(theirs)
    same(theirs, ours)
    in_training = theirs.weight.detach().clone()
    theirs.eval()
    assert not torch.allclose(in_training, theirs.weight, atol=1e-3)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training).layer.weight, theirs.weight)
