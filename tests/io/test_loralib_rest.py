"""Heads, biases and base weights in a loralib checkpoint: placed, compared, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import nn

from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import Blueprint, blueprint_of
from rankwise.io.loralib import Unsaid, read_loralib
from rankwise.io.portable import Portable


def pair() -> tuple[nn.Module, nn.Module]:
    """A loralib model that has trained, biases and head too, and the plain one it began as."""
    torch.manual_seed(3)
    plain = nn.ModuleDict(
        {"query": nn.Linear(5, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 2)}
    )
    model = nn.ModuleDict(
        {**copy.deepcopy(plain), "query": loralib.Linear(5, 6, r=2, lora_alpha=4)}
    )
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        nn.init.normal_(model["query"].lora_B)
        model["query"].bias += torch.arange(6.0)
        model["head"].weight += 1
        model["head"].bias += 1
    return model.train(), plain


def read(path: Path, base: Blueprint | None = None, **said: Any) -> Portable:
    return read_loralib(path, Unsaid(alpha=4, **said), base=base, allow_pickle=True)


def test_a_bias_is_what_was_added_to_the_bases(tmp_path: Path):
    model, plain = pair()
    torch.save(loralib.lora_state_dict(model, bias="lora_only"), tmp_path / "x.pt")
    adapter = read(tmp_path / "x.pt", blueprint_of(plain)).adapter
    assert list(adapter.biases) == ["query.bias"]
    torch.testing.assert_close(adapter.biases["query.bias"], torch.arange(6.0))
    assert adapter.method.bias == "adapted"


def test_all_biases_are_what_was_added(tmp_path: Path):
    model, plain = pair()
    torch.save(loralib.lora_state_dict(model, bias="all"), tmp_path / "x.pt")
    adapter = read(tmp_path / "x.pt", blueprint_of(plain), modules=["head"]).adapter
    assert list(adapter.biases) == ["query.bias", "norm.bias"]
    assert not adapter.biases["norm.bias"].any()
    assert adapter.method.bias == "all"


def test_biases_without_the_base_are_refused_with_the_reason(tmp_path: Path):
    torch.save(loralib.lora_state_dict(pair()[0], bias="lora_only"), tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=r"1 biases, as 'query\.bias'.*give the base"):
        read(tmp_path / "x.pt")


def test_a_head_is_taken_when_it_is_named(tmp_path: Path):
    model, _ = pair()
    head = {k: v for k, v in model.state_dict().items() if k.startswith("head")}
    torch.save(loralib.lora_state_dict(model) | head, tmp_path / "x.pt")
    adapter = read(tmp_path / "x.pt", modules=["head"]).adapter
    assert adapter.modules == ("head",)
    assert adapter.method.modules_to_save == ("head",)
    assert torch.equal(adapter.trained["head.weight"], model["head"].weight)
    with pytest.raises(ArtifactError, match=r"(?s)1 biases.*1 further tensors, as 'head\.weight'"):
        read(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"'classifier' trained whole"):
        read(tmp_path / "x.pt", modules=["head", "classifier"])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_full_state_dict_would_count_the_update_twice(tmp_path: Path, mode: str):
    """A fault of loralib: eval() merges in place, and a state dict saved then has both."""
    model, plain = pair()
    getattr(model, mode)()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=r"the weight of 1 adapted layers.*would count twice"):
        read(tmp_path / "x.pt")
    told = read(tmp_path / "x.pt", drop_base=True)
    assert list(told.factors) == ["query"]
    assert "left out: 6 tensors of the base (3 of them biases), as was asked" in told.notes[1]
    known = read(tmp_path / "x.pt", blueprint_of(plain), modules=["head"])
    assert known.adapter.trained["head.weight"].mean() > 0.5
    merged = [note for note in known.notes if "saved in eval mode" in note]
    assert len(merged) == (mode == "eval")
    assert list(known.adapter.biases) == ["query.bias"]  # the norm's has not changed


def test_reading_a_merged_checkpoint_gives_the_function_once(tmp_path: Path):
    import rankwise

    model, plain = pair()
    with torch.no_grad():
        for name in ("query", "head"):
            model[name].bias.copy_(plain[name].bias)
    x = torch.randn(3, 5)
    want = model["query"](x)
    torch.save(model.eval().state_dict(), tmp_path / "x.pt")
    assert not torch.allclose(model["query"].weight, plain["query"].weight, atol=1e-2)
    portable = read(tmp_path / "x.pt", blueprint_of(plain), modules=["head"])
    rankwise.attach(plain, portable.adapter)
    torch.testing.assert_close(plain["query"](x), want, rtol=0, atol=1e-6)


def test_a_changed_weight_that_is_no_merge_is_refused(tmp_path: Path):
    model, plain = pair()
    model["norm"].weight.data += 1
    torch.save(model.state_dict(), tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=r"'norm\.weight' is not the base's"):
        read(tmp_path / "x.pt", blueprint_of(plain), modules=["head"])
    taken = read(tmp_path / "x.pt", blueprint_of(plain), modules=["head", "norm"]).adapter
    assert taken.modules == ("norm", "head")


def test_a_tensor_that_the_base_lacks_is_refused(tmp_path: Path):
    model, plain = pair()
    state = loralib.lora_state_dict(model) | {"extra.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=r"has no 'extra\.weight' of shape \(2, 2\)"):
        read(tmp_path / "x.pt", blueprint_of(plain))
    assert list(read(tmp_path / "x.pt", blueprint_of(plain), drop_base=True).factors) == ["query"]


def test_an_older_loralib_names_the_weight_of_a_convolution_twice(tmp_path: Path):
    """A fault of loralib: its convolution is the base's and holds the base's, under two names."""
    layer = loralib.Conv2d(2, 20, 3, r=1, lora_alpha=4)
    nn.init.normal_(layer.lora_B)
    state = {f"conv.{k}": v for k, v in layer.state_dict().items()}
    state |= {"conv.weight": layer.conv.weight, "conv.bias": layer.conv.bias}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match="the weight of 2 adapted layers"):
        read(tmp_path / "x.pt")
    portable = read(tmp_path / "x.pt", drop_base=True)
    assert portable.kernels["conv"].shape == (2, 3, 3)
    before = layer.conv.weight.detach().clone()
    layer.eval()  # which merges
    delta = portable.factors["conv"].delta().reshape(before.shape)
    torch.testing.assert_close(delta, layer.conv.weight - before, rtol=1e-4, atol=1e-5)
