"""PEFT's adapter_model.bin: opened on demand, for its tensors alone, and nothing of it is run."""

import json
import pickle
from pathlib import Path

import peft
import pytest
import torch

from rankwise.errors import ArtifactError
from rankwise.io.adapters import load_adapter


@pytest.fixture
def bin_folder(tmp_path: Path, base) -> Path:
    """A folder that PEFT wrote with safe_serialization=False, and its name for the tensors."""
    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["query"]))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(tmp_path, safe_serialization=False)
    torch.save(model(torch.tensor([[1, 2, 3]])).detach(), tmp_path / "wanted")
    assert (tmp_path / "adapter_model.bin").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    return tmp_path


def test_a_pickle_is_read_on_demand_alone(bin_folder: Path, base):
    with pytest.raises(ArtifactError, match=r"allow_pickle=True, which reads adapter_model\.bin"):
        load_adapter(base(), bin_folder)
    load_adapter(model := base(), bin_folder, allow_pickle=True)
    found = model.eval()(torch.tensor([[1, 2, 3]]))
    wanted = torch.load(bin_folder / "wanted", weights_only=True)
    torch.testing.assert_close(found, wanted)


def test_safetensors_come_first(bin_folder: Path, base):
    (bin_folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"safetensors' is empty"):
        load_adapter(base(), bin_folder, allow_pickle=True)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


FILES = {
    "text": lambda path: path.write_text("hello, this is no adapter"),
    "a page": lambda path: path.write_text("<!DOCTYPE html><html></html>"),
    "cut zip": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "code": lambda path: torch.save({"a": Bomb(path.with_name("sentinel"))}, path),
    "old code": lambda path: path.write_bytes(pickle.dumps(Bomb(path.with_name("sentinel")))),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "a number": lambda path: torch.save({"a": 3}, path),
    "nan": lambda path: torch.save({"a": torch.tensor(float("nan"))}, path),
}


@pytest.mark.parametrize("case", FILES)
def test_a_pickle_of_anything_else_is_refused_and_not_run(bin_folder: Path, base, case: str):
    FILES[case](bin_folder / "adapter_model.bin")
    model = base()
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin") as found:
        load_adapter(model, bin_folder, allow_pickle=True)
    assert (found.value.exit_code, len(str(found.value)) < 800) == (3, True)
    assert not (bin_folder / "sentinel").exists()
    assert [type(m) for m in model.modules()] == [type(m) for m in base().modules()]


def test_a_pickle_of_a_whole_state_dict_is_understood(bin_folder: Path, base):
    """PEFT's own state_dict, with the adapter's name in its keys and the frozen base beside it."""
    model = peft.PeftModel.from_pretrained(base(), bin_folder)
    torch.save(model.state_dict(), bin_folder / "adapter_model.bin")
    config = json.loads((bin_folder / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == 2
    load_adapter(mine := base(), bin_folder, allow_pickle=True)
    wanted = torch.load(bin_folder / "wanted", weights_only=True)
    torch.testing.assert_close(mine.eval()(torch.tensor([[1, 2, 3]])), wanted)
