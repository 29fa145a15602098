"""A format is told by names and keys; what cannot be told is asked for, never guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foreign import peft_folder
from rankwise.errors import ArtifactError, UserError
from rankwise.io.convert import Wishes, convert
from rankwise.io.detect import detect, home

FORMATS = ("peft", "loralib", "mlx", "kohya", "diffusers", "gguf")


@pytest.fixture(scope="module")
def every(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter in each format, in folders by the names of these."""
    folder = tmp_path_factory.mktemp("every")
    peft_folder(llama, folder / "peft", r=2, target_modules=["q_proj"])
    for to in FORMATS[1:]:
        convert(folder / "peft", to, folder / to, Wishes(base=llama, component="unet"))
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_with_an_adapter_is_told(every: Path, name: str):
    found, place = detect(every / name)
    assert found == name
    assert place == every / name or place.parent == every / name


@pytest.mark.parametrize("name", ["loralib", "kohya", "diffusers", "gguf"])
def test_a_file_is_told(every: Path, name: str):
    (file,) = (every / name).iterdir()
    assert detect(file) == (name, file)


def test_a_folder_in_the_folder_is_found(every: Path, tmp_path: Path):
    shutil.copytree(every / "peft", tmp_path / "outer" / "named")
    assert detect(tmp_path / "outer") == ("peft", tmp_path / "outer" / "named")
    shutil.copytree(every / "mlx", tmp_path / "outer" / "other")
    with pytest.raises(UserError, match=r"holds several adapters; name one: .*named, .*other"):
        detect(tmp_path / "outer")


def test_loralib_keys_in_safetensors_are_told(tmp_path: Path):
    save_file(
        {"q.lora_A": torch.ones(1, 2), "q.lora_B": torch.ones(2, 1)}, tmp_path / "x.safetensors"
    )
    assert detect(tmp_path)[0] == "loralib"


@pytest.mark.parametrize(("name", "told"), [("peft", "PEFT"), ("mlx", "mlx-lm")])
def test_weights_without_their_config_are_not_believed(
    every: Path, tmp_path: Path, name: str, told: str
):
    (weights,) = (every / name).glob("*.safetensors")
    shutil.copy(weights, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"is a weights file of {told}.*Name the folder"):
        detect(tmp_path / "x.safetensors")


def test_what_is_no_adapter_is_refused(llama: Path, tmp_path: Path):
    with pytest.raises(UserError, match="There is no"):
        home(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no adapter of a known format. It holds: nothing"):
        home(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="no adapter by its name"):
        home(tmp_path / "x.txt")
    with pytest.raises(UserError, match="no low-rank factors under names that are known"):
        detect(llama / "model.safetensors")
    (tmp_path / "rankwise.json").write_text("{}")
    with pytest.raises(UserError, match="what another method than LoRA trained"):
        home(tmp_path)


def test_damage_is_told(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="not a valid safetensors file"):
        detect(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        detect(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"x": "y" * 1_000_001}))
    with pytest.raises(ArtifactError, match="larger than"):
        detect(tmp_path)


def test_a_run_means_its_adapter(every: Path, tmp_path: Path):
    for part in ("adapter", "last"):
        shutil.copytree(every / "peft", tmp_path / "run" / part)
    (tmp_path / "run" / "manifest.json").write_text("{}")
    assert detect(tmp_path / "run") == ("peft", tmp_path / "run" / "adapter")
