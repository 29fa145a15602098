"""kohya's files, by the formulas of its modules; diffusers' own loader was run on them by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from foreign import our_outputs, peft_folder, same_deltas
from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import blueprint
from rankwise.io.kohya import read_kohya, write_kohya
from rankwise.io.peft_alone import read_peft_alone
from rankwise.io.portable import Kernel, Portable, assemble
from rankwise.lowrank import Factors

NAMES = ("down.0.to_q", "down.0.conv", "mid.ff")


def made(**more: Any) -> Portable:
    factors = {
        "down.0.to_q": Factors(torch.randn(2, 5), torch.randn(6, 2), 4.0),
        "down.0.conv": Factors(torch.randn(2, 27), torch.randn(4, 2), 4.0),
    }
    kernels = {"down.0.conv": Kernel((3, 3, 3))}
    return Portable(assemble(factors, **more), kernels=kernels, component="unet")


def test_the_files_mean_what_kohya_computes(tmp_path: Path):
    """networks/lora.py: org(x) + lora_up(lora_down(x)) · alpha / dim."""
    portable = made()
    write_kohya(portable, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "lora_unet_down_0_to_q.lora_down.weight": (2, 5),
        "lora_unet_down_0_to_q.lora_up.weight": (6, 2),
        "lora_unet_down_0_to_q.alpha": (),
        "lora_unet_down_0_conv.lora_down.weight": (2, 3, 3, 3),
        "lora_unet_down_0_conv.lora_up.weight": (4, 2, 1, 1),
        "lora_unet_down_0_conv.alpha": (),
    }
    x = torch.randn(1, 3, 7, 7)
    key = "lora_unet_down_0_conv"
    down = torch.conv2d(x, tensors[f"{key}.lora_down.weight"])
    y = torch.conv2d(down, tensors[f"{key}.lora_up.weight"]) * tensors[f"{key}.alpha"] / 2
    weight = portable.factors["down.0.conv"].delta().reshape(4, 3, 3, 3)
    torch.testing.assert_close(y, torch.conv2d(x, weight), rtol=1e-4, atol=1e-4)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        said = file.metadata()
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "8")


def test_the_way_there_and_back(tmp_path: Path):
    portable = made(
        magnitudes={n: torch.rand(o) for n, o in (("down.0.to_q", 6), ("down.0.conv", 4))}
    )
    write_kohya(portable, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["lora_unet_down_0_conv.dora_scale"].shape == (4, 1, 1, 1)
    back = read_kohya(tmp_path / "x.safetensors", NAMES)
    assert same_deltas(back, portable, 0)
    assert back.kernels == portable.kernels
    assert back.component == "unet"
    for name, m in portable.adapter.magnitudes.items():
        assert torch.equal(back.adapter.magnitudes[name], m)


def test_logits_are_the_same_after_the_way_there_and_back(llama: Path, tmp_path: Path):
    config = {"r": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 3}}
    want, _ = peft_folder(llama, tmp_path / "p", lora_alpha=8, use_rslora=True, **config)
    written = write_kohya(
        read_peft_alone(tmp_path / "p"), tmp_path / "x.safetensors", component="lora_te1"
    )
    assert "diffusers loses alphas that differ" in written.notes[0]
    back = read_kohya(tmp_path / "x.safetensors", blueprint(llama).names)
    assert back.component == "text_encoder"
    assert (our_outputs(llama, back) - want).abs().max() < 1e-6


def test_alpha_is_the_rank_where_it_is_missing_or_zero(tmp_path: Path):
    write_kohya(made(), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    del tensors["lora_unet_down_0_to_q.alpha"]
    tensors["lora_unet_down_0_conv.alpha"] = torch.tensor(0.0)
    save_file(tensors, tmp_path / "x.safetensors")
    back = read_kohya(tmp_path / "x.safetensors", NAMES)
    assert {f.scale for f in back.factors.values()} == {1.0}


def test_the_way_back_needs_names(tmp_path: Path):
    write_kohya(made(), tmp_path / "x.safetensors")
    read = [(), NAMES[:1], (*NAMES, "down_0.to_q")]
    told = [
        "every dot became an underscore",
        "down_0_conv' is no module",
        "down.0.to_q or down_0.to_q",
    ]
    for names, words in zip(read, told, strict=True):
        with pytest.raises(UserError, match=words):
            read_kohya(tmp_path / "x.safetensors", names)


def test_one_of_several_models_is_chosen(tmp_path: Path):
    for component in ("unet", "lora_te2"):
        write_kohya(made(), tmp_path / f"{component}.safetensors", component=component)
    both = load_file(tmp_path / "unet.safetensors") | load_file(tmp_path / "lora_te2.safetensors")
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"several models of a pipeline.*--component lora_"):
        read_kohya(tmp_path / "x.safetensors", NAMES)
    back = read_kohya(tmp_path / "x.safetensors", NAMES, component="text_encoder_2")
    assert back.notes == ("left out: lora_unet, other models of the pipeline",)
    with pytest.raises(UserError, match="nothing for 'lora_te1'"):
        read_kohya(tmp_path / "x.safetensors", NAMES, component="lora_te1")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lora_unet_down_0_to_q.lora_up.weight": None}, "'down.0.to_q' has no B"),
        ({"lora_unet_down_0_to_q.hada_w1_a": torch.ones(2)}, "is LoHa"),
        ({"lora_unet_down_0_to_q.lora_mid.weight": torch.ones(2)}, "third factor"),
        ({"unet.x.lora_up.weight": torch.ones(2)}, "is no name of kohya's"),
        ({"lora_unet_down_0_to_q.alpha": torch.tensor(-1.0)}, "must not be negative"),
        ({"lora_unet_down_0_to_q.dora_scale": torch.ones(1, 5)}, "magnitude by output"),
        (
            {"lora_unet_down_0_to_q.lora_down.weight": torch.ones(3, 5)},
            r"A \(3, 5\) and B \(6, 2\)",
        ),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], told: str, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_kohya(made(), path)
    tensors = {k: v for k, v in (load_file(path) | change).items() if v is not None}
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=told):
        read_kohya(path, NAMES)


def test_what_kohya_cannot_say_is_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"'vae' is none of them.*lora_unet"):
        write_kohya(made(), path, component="vae")
    with pytest.raises(UserError, match=r"modules that trained whole \('head'\)"):
        write_kohya(made(modules=["head"]), path)
    f = Factors(torch.randn(2, 5), torch.randn(6, 2), 1.0)
    twins = Portable(assemble({"a.b": f, "a_b": f}), component="unet")
    with pytest.raises(UserError, match="Two modules would have one name: 'lora_unet_a_b'"):
        write_kohya(twins, path)
    assert not path.exists()
