"""diffusers' files: its metadata is PEFT's config; its own loader was run on ours by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from foreign import our_outputs, peft_folder, same_deltas
from rankwise.errors import ArtifactError, UserError
from rankwise.io.diffusers import WEIGHTS, read_diffusers, write_diffusers
from rankwise.io.peft_alone import read_peft_alone
from rankwise.io.portable import Kernel, Portable, assemble
from rankwise.lowrank import Factors

KEY = "lora_adapter_metadata"


def made(scale: float = 1.0, **more: Any) -> Portable:
    factors = {
        "down.to_q": Factors(torch.randn(2, 5), torch.randn(6, 2), scale),
        "conv": Factors(torch.randn(3, 27), torch.randn(4, 3), scale),
    }
    return Portable(
        assemble(factors, **more), kernels={"conv": Kernel((3, 3, 3))}, component="unet"
    )


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_file_means_the_same_with_and_without_its_metadata(tmp_path: Path):
    import peft

    portable = made(2.0)
    write_diffusers(portable, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "unet.down.to_q.lora_A.weight": (3, 5),
        "unet.down.to_q.lora_B.weight": (6, 3),
        "unet.conv.lora_A.weight": (3, 3, 3, 3),
        "unet.conv.lora_B.weight": (4, 3, 1, 1),
    }
    said = json.loads(metadata(tmp_path / WEIGHTS)[KEY])
    config = peft.LoraConfig(**{k.removeprefix("unet."): v for k, v in said.items()})
    assert (config.r, config.lora_alpha) == (3, 3)
    assert config.target_modules == {"down.to_q", "conv"}
    for name, f in portable.factors.items():
        a, b = (tensors[f"unet.{name}.lora_{s}.weight"].flatten(1) for s in "AB")
        torch.testing.assert_close(b @ a, f.delta())
    with_it = read_diffusers(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    without = read_diffusers(tmp_path / WEIGHTS)
    assert same_deltas(with_it, without, 0)
    assert same_deltas(with_it, portable)
    assert with_it.kernels == portable.kernels
    assert (with_it.component, without.component) == ("unet", "unet")


def test_logits_are_the_same_after_the_way_there_and_back(llama: Path, tmp_path: Path):
    config = {"r": 4, "target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"q_proj": 3}}
    want, _ = peft_folder(llama, tmp_path / "p", lora_alpha=8, use_rslora=True, **config)
    write_diffusers(read_peft_alone(tmp_path / "p"), tmp_path / "d", component="text_encoder")
    back = read_diffusers(tmp_path / "d")
    assert (our_outputs(llama, back) - want).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("said", "scales"),
    [
        ({"r": 3, "rank_pattern": {"to_q": 2}, "lora_alpha": 6}, (3.0, 2.0)),
        (
            {"r": 2, "rank_pattern": {"conv": 3}, "lora_alpha": 6, "alpha_pattern": {"conv": 9}},
            (3, 3),
        ),
        (
            {"r": 3, "rank_pattern": {"to_q": 2}, "lora_alpha": 6, "use_rslora": True},
            (6 / 2**0.5, 6 / 3**0.5),
        ),
        ({}, (1.0, 1.0)),
    ],
)
@pytest.mark.parametrize("front", ["unet.", ""])
def test_the_metadata_is_believed(
    said: dict[str, Any], scales: tuple[float, float], front: str, tmp_path: Path
):
    tensors: dict[str, torch.Tensor] = {}
    for name, f in made().factors.items():
        tensors[f"{front}{name}.lora_A.weight"] = f.A
        tensors[f"{front}{name}.lora_B.weight"] = f.B
    text = json.dumps({front + k: v for k, v in said.items()})
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt", KEY: text})
    back = read_diffusers(tmp_path, component="unet")
    found = back.factors["down.to_q"].scale, back.factors["conv"].scale
    assert found == pytest.approx(scales)
    assert back.component == "unet"


def test_an_alpha_of_a_module_counts(tmp_path: Path):
    f = made().factors["down.to_q"]
    tensors = {
        "unet.q.lora_A.weight": f.A,
        "unet.q.lora_B.weight": f.B,
        "unet.q.alpha": torch.tensor(8.0),
    }
    save_file(tensors, tmp_path / WEIGHTS)
    assert read_diffusers(tmp_path).factors["q"].scale == 4.0


def test_magnitudes_are_kept(tmp_path: Path):
    portable = made(magnitudes={"down.to_q": torch.rand(6), "conv": torch.rand(4)})
    write_diffusers(portable, tmp_path)
    assert load_file(tmp_path / WEIGHTS)["unet.conv.lora_magnitude_vector"].shape == (1, 4, 1, 1)
    back = read_diffusers(tmp_path).adapter
    assert back.method.dora
    assert all(torch.equal(back.magnitudes[k], m) for k, m in portable.adapter.magnitudes.items())


def test_one_of_several_models_is_chosen(tmp_path: Path):
    for component in ("unet", "text_encoder"):
        write_diffusers(made(), tmp_path / component, component=component)
    both = load_file(tmp_path / "unet" / WEIGHTS) | load_file(tmp_path / "text_encoder" / WEIGHTS)
    save_file(both, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"several models of a pipeline \((unet|text_encoder), "):
        read_diffusers(tmp_path)
    assert "text_encoder, other models" in read_diffusers(tmp_path, component="unet").notes[1]
    with pytest.raises(UserError, match="nothing for 'transformer'"):
        read_diffusers(tmp_path, component="transformer")


A, B = torch.ones(2, 5), torch.ones(6, 2)


@pytest.mark.parametrize(
    ("tensors", "said", "told"),
    [
        ({"unet.q.lora_A.weight": A}, {}, "'q' has no B"),
        (
            {"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B},
            {"r": 3, "lora_alpha": 3},
            "metadata says 3",
        ),
        (
            {"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B},
            {"r": 2, "lora_alpha": "x"},
            "alpha must be",
        ),
        (
            {"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B},
            {"r": 2, "rank_pattern": [1]},
            "must map",
        ),
        ({"unet.to_q.lora.down.weight": A}, {}, r"before 0\.22"),
        ({"unet.processor.to_q_lora.up.weight": A}, {}, r"before 0\.22"),
        ({"base_model.model.q.lora_A.bias": A}, {}, "It is PEFT's"),
        (
            {
                "unet.q.lora_A.weight": A,
                "unet.q.lora_B.weight": B,
                "unet.q.lora_magnitude_vector": A + 1,
            },
            {},
            "magnitude that does not go with",
        ),
    ],
)
def test_what_is_wrong_is_named(
    tensors: dict[str, torch.Tensor], said: dict[str, Any], told: str, tmp_path: Path
):
    text = json.dumps({f"unet.{k}": v for k, v in said.items()})
    save_file(tensors, tmp_path / WEIGHTS, {KEY: text})
    with pytest.raises(ArtifactError, match=told):
        read_diffusers(tmp_path)


@pytest.mark.parametrize("component", [None, "vae"])
def test_the_model_of_the_pipeline_must_be_named(component: str | None, tmp_path: Path):
    adapter = made().adapter
    with pytest.raises(UserError, match="Give component"):
        write_diffusers(Portable(adapter), tmp_path / "a", component=component)
