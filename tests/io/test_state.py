"""What HeadOnly and Full trained: the round trip, and what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
from rankwise.errors import ArtifactError, UserError
from rankwise.io.adapters import load_adapter, save_adapter
from rankwise.io.state import load_trained, save_trained

METHODS = {
    "head": rw.HeadOnly(),
    "head and more": rw.HeadOnly(modules_to_save=("1.fc",)),
    "full": rw.Full(),
}


@pytest.mark.parametrize("case", METHODS)
def test_what_was_trained_comes_back(tmp_path: Path, base, trained, ids, case: str):
    model = trained(METHODS[case])
    folder = save_adapter(model, tmp_path / "a")
    assert sorted(p.name for p in folder.iterdir()) == ["rankwise.json", "trained.safetensors"]
    record = load_adapter(again := base(), folder)
    assert record.method == METHODS[case]
    assert torch.equal(again.eval()(ids), model(ids))
    mine, other = model.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, other[key]) for key, tensor in mine.items())
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == wanted


def test_only_what_trained_is_in_the_file(tmp_path: Path, trained):
    folder = save_trained(trained(METHODS["head and more"]), tmp_path / "a", base_model_name="tiny")
    assert set(load_file(folder / "trained.safetensors")) == {
        *("head.weight", "head.bias", "blocks.1.fc.weight", "blocks.1.fc.bias")
    }
    assert json.loads((folder / "rankwise.json").read_text("utf-8")) == {
        "format": "rankwise-trained",
        "version": 1,
        "method": "HeadOnly",
        "base_model_name_or_path": "tiny",
        "modules": ["head", "blocks.1.fc"],
        "modules_to_save": ["1.fc"],
    }


def test_full_saves_shared_weights_once_and_buffers_too(tmp_path: Path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    model = make()
    rw.attach(model, rw.Full())
    model.train()(torch.randn(8, 4))
    folder = save_trained(model, tmp_path / "a")
    assert "0.weight" in load_file(folder / "trained.safetensors")
    assert "2.weight" not in load_file(folder / "trained.safetensors")
    load_trained(again := make(), folder)
    assert torch.equal(again[1].running_mean, model[1].running_mean)
    assert again[2].weight is again[0].weight


@pytest.fixture
def head(tmp_path: Path, trained) -> Path:
    return save_adapter(trained(rw.HeadOnly()), tmp_path / "head")


def refused(folder: Path, model: nn.Module, message: str) -> None:
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=message) as found:
        load_adapter(model, folder)
    assert found.value.exit_code == 3
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in before.items())
    detached = "carries no adapter"
    with pytest.raises(UserError, match=detached):
        rw.attachment(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"head.weight": t["head.weight"]}, r"'head\.bias' is missing in the file"),
        (
            lambda t: {**t, "hoad.weight": torch.ones(1)},
            r"'hoad\.weight' has no place in the model\. Did you mean 'head\.weight'",
        ),
        (lambda t: {**t, "head.bias": torch.ones(4)}, r"'head\.bias' has shape \(4,\), and \(3,\)"),
        (
            lambda t: {**t, "head.bias": torch.ones(3, dtype=torch.int32)},
            r"'head\.bias' is torch\.int32, and floating-point",
        ),
        (lambda t: {**t, "head.bias": torch.full((3,), torch.nan)}, "has 3 of 3 NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(head: Path, base, change, message: str):
    path = head / "trained.safetensors"
    save_file(change(load_file(path)), path)
    refused(head, base(), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "format must be"),
        ({"version": 2}, "version must be 1; a newer Rankwise"),
        ({"method": "LoRA"}, "method must be one of 'HeadOnly', 'Full'"),
        ({"modules": "head"}, "modules must be a list of names"),
        ({"modules": ["hoad"]}, r"the model has no module 'hoad'\. Did you mean 'head'"),
        ({"modules_to_save": ["1.fc"]}, r"lists the modules \['head'\].* are \['head', 'blocks"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(head: Path, base, change, message: str):
    path = head / "rankwise.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), "utf-8")
    refused(head, base(), message)


def test_a_card_that_is_no_card_is_refused(head: Path, base):
    for content, message in (
        (b"", "is empty"),
        (b"{", "not valid JSON"),
        (b" " * 1_000_001, "is larger than"),
    ):
        (head / "rankwise.json").write_bytes(content)
        refused(head, base(), message)


def test_a_head_on_another_base_is_refused(head: Path, base):
    refused(head, base(seed=1), "it was made on another base")


def test_full_needs_no_certain_base_but_the_same_shape(tmp_path: Path, base, trained, ids):
    model = trained(rw.Full())
    folder = save_adapter(model, tmp_path / "full")
    load_adapter(other := base(seed=1), folder)
    assert torch.equal(other.eval()(ids), model(ids))
    refused(folder, base(blocks=1), r"blocks\.1.* has no place in the model")


def test_what_diverged_is_not_saved(tmp_path: Path, trained):
    model = trained(rw.HeadOnly())
    model.head.bias.data[0] = torch.inf
    with pytest.raises(UserError, match=r"not finite and are not saved.*head\.bias"):
        save_trained(model, tmp_path / "a")


def test_a_method_with_factors_is_not_saved_this_way(tmp_path: Path, trained):
    with pytest.raises(UserError, match="LoRA is not saved tensor by tensor"):
        save_trained(trained(), tmp_path / "a")
