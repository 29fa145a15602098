"""mlx-lm's files, by the formulas of its layers; its own loader was run on such files by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from foreign import our_outputs, peft_folder, peft_outputs, same_deltas
from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import blueprint
from rankwise.io.mlx import read_mlx, write_mlx
from rankwise.io.peft_alone import read_peft_alone, write_peft_alone
from rankwise.io.portable import Portable, assemble
from rankwise.lowrank import Factors


def files(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    said = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return load_file(folder / "adapters.safetensors"), said


def block(number: int, key: str) -> str:
    return f"model.layers.{number}.{key}"


def portable(*names: str, r: int = 2, scale: float = 3.0) -> Portable:
    return Portable(
        assemble({n: Factors(torch.randn(r, 5), torch.randn(6, r), scale) for n in names})
    )


def test_the_files_mean_what_mlx_computes(tmp_path: Path):
    """mlx_lm.tuner.lora.LoRALinear: y = W x + scale · (x @ lora_a) @ lora_b."""
    made = portable("model.layers.0.q")
    write_mlx(made, tmp_path / "a")
    tensors, said = files(tmp_path / "a")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "model.layers.0.q.lora_a": (5, 2),
        "model.layers.0.q.lora_b": (2, 6),
    }
    x = torch.randn(3, 5)
    y = x @ tensors["model.layers.0.q.lora_a"] @ tensors["model.layers.0.q.lora_b"]
    torch.testing.assert_close(
        said["lora_parameters"]["scale"] * y, made.factors["model.layers.0.q"].apply(x)
    )
    assert said["lora_parameters"]["rank"] == 2
    assert said["fine_tune_type"] == "lora"


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
        {"r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], "use_rslora": True},
    ],
)
def test_the_way_there_and_back_gives_the_same_logits(
    llama: Path, tmp_path: Path, config: dict[str, Any]
):
    want, plain = peft_folder(llama, tmp_path / "peft", **config)
    write_mlx(read_peft_alone(tmp_path / "peft"), tmp_path / "mlx", base=blueprint(llama))
    back = read_mlx(tmp_path / "mlx")
    assert (our_outputs(llama, back) - want).abs().max() < 1e-6
    write_peft_alone(back, tmp_path / "back")
    assert (peft_outputs(llama, tmp_path / "back") - want).abs().max() < 1e-6
    assert (want - plain).abs().max() > 1e-2


def test_magnitudes_go_there_and_back(llama: Path, tmp_path: Path):
    want, _ = peft_folder(llama, tmp_path / "p", r=2, target_modules=["q_proj"], use_dora=True)
    write_mlx(read_peft_alone(tmp_path / "p"), tmp_path / "mlx")
    tensors, said = files(tmp_path / "mlx")
    assert said["fine_tune_type"] == "dora"
    assert tensors[block(0, "self_attn.q_proj.m")].shape == (32,)
    assert (our_outputs(llama, read_mlx(tmp_path / "mlx")) - want).abs().max() < 1e-6


def config_of(folder: Path, total: int, **more: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"num_hidden_layers": total, **more}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("numbers", "total", "layers", "by_block"),
    [
        ((0, 1, 2), 3, 3, True),
        ((1, 2), 3, 2, True),
        ((1, 2), 4, 3, False),  # not the last ones
        ((0, 2), 3, 3, False),  # a gap
        ((1, 2), None, 2, False),  # who knows how many there are
    ],
)
def test_which_layers_mlx_adapts(
    numbers: tuple[int, ...], total: int | None, layers: int, by_block: bool, tmp_path: Path
):
    made = portable(*(block(n, k) for n in numbers for k in ("mlp.up", "q")))
    base = None if total is None else blueprint(config_of(tmp_path, total))
    write_mlx(made, tmp_path / "a", base=base)
    said = files(tmp_path / "a")[1]
    assert said["num_layers"] == layers
    keys = ["mlp.up", "q"] if by_block else sorted(made.factors)
    assert said["lora_parameters"]["keys"] == keys


def test_blocks_that_differ_are_named_in_full(tmp_path: Path):
    made = portable(block(0, "q"), block(1, "q"), block(1, "v"), "lm_head")
    write_mlx(made, tmp_path / "a", base=blueprint(config_of(tmp_path, 2)))
    assert files(tmp_path / "a")[1]["lora_parameters"]["keys"] == sorted(made.factors)


def test_one_rank_and_one_scale(tmp_path: Path):
    own = {**portable("a").factors, **portable("b", r=3, scale=1.0).factors}
    made = Portable(assemble(own))
    written = write_mlx(made, tmp_path / "x")
    assert [note.partition(":")[0] for note in written.notes] == [
        "fold",
        "pad",
        "names",
        "keys",
        "scale",
    ]
    said = files(tmp_path / "x")[1]["lora_parameters"]
    assert (said["rank"], said["scale"]) == (3, 1.0)
    assert same_deltas(read_mlx(tmp_path / "x"), made)


@pytest.mark.parametrize(
    ("adapter", "tied", "told"),
    [
        ({"modules": ["head"]}, False, "modules that trained whole"),
        ({"biases": {"q.bias": torch.ones(6)}}, False, "trained biases"),
        ({"magnitudes": {"q": torch.ones(6)}}, False, "DoRA everywhere or nowhere, and 'e' has"),
        ({}, True, "to the output as well"),
    ],
)
def test_what_mlx_would_compute_otherwise_is_refused(
    adapter: dict[str, Any], tied: bool, told: str, tmp_path: Path
):
    f = portable("q", "e").factors
    made = Portable(assemble(f, **adapter), embeddings=frozenset({"e"} if tied else ()))
    base = blueprint(config_of(tmp_path, 2, tie_word_embeddings=tied))
    with pytest.raises(UserError, match=told):
        write_mlx(made, tmp_path / "a", base=base)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({"a.lora_b": None}, {}, "'a' has no B"),
        ({"a.lora_a": torch.ones(2, 5)}, {}, r"'a' has A \(5, 2\) and B \(6, 2\)"),
        ({"a.weight": torch.ones(2)}, {}, "'a.weight' is neither lora_a"),
        ({"a.m": torch.ones(6)}, {}, "'a.m' is neither lora_a"),
        ({"a.lora_a": torch.ones(2, 5, 2)}, {}, "bank of experts"),
        ({}, {"fine_tune_type": "full"}, "'lora' or 'dora' is needed"),
        ({}, {"fine_tune_type": "dora"}, "'a' has no magnitude"),
        ({}, {"lora_parameters": {"rank": 2, "alpha": 4}}, "scale must be a number above 0"),
        ({}, {"lora_parameters": {"scale": True}}, "scale must be a number above 0"),
    ],
)
def test_what_is_wrong_is_named(
    tensors: dict[str, Any], config: dict[str, Any], told: str, tmp_path: Path
):
    folder = tmp_path / "a"
    write_mlx(portable("a"), folder)
    held, said = files(folder)
    held = {k: v for k, v in (held | tensors).items() if v is not None}
    save_file(held, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(said | config), encoding="utf-8")
    with pytest.raises(ArtifactError, match=told):
        read_mlx(folder)


def test_one_update_on_both_ends_of_a_tie_goes_there_and_back(tmp_path: Path):
    """mlx-lm has it on both ends by itself where the base ties them, and nowhere else."""
    f = portable("model.embed_tokens").factors

    def both(name: str = "model.embed_tokens") -> Portable:
        adapter = assemble({name: f["model.embed_tokens"]})
        named = frozenset({name} if "embed" in name else ())
        method = replace(adapter.method, tied=True)
        return Portable(replace(adapter, method=method), embeddings=named)

    base, other = (
        blueprint(config_of(tmp_path, 1, tie_word_embeddings=tied)) for tied in (True, False)
    )
    write_mlx(both(), tmp_path / "a", base=base)
    again = read_mlx(tmp_path / "a", base=base)
    assert again.adapter.method.tied
    assert same_deltas(again, both())
    for made, plan, told in (
        (both(), None, "only the base tells"),
        (both(), other, "does not tie them"),
        (both("lm_head"), base, "named by the output layer 'lm_head'"),
    ):
        with pytest.raises(UserError, match=told):
            write_mlx(made, tmp_path / "b", base=plan)


def test_an_embedding_with_a_magnitude_is_refused(tmp_path: Path):
    f = portable("model.embed_tokens").factors
    adapter = assemble(f, magnitudes={"model.embed_tokens": torch.ones(6)})
    made = Portable(adapter, embeddings=frozenset(f))
    with pytest.raises(UserError, match="magnitude is by token in mlx-lm"):
        write_mlx(made, tmp_path / "a")


def test_a_base_whose_config_counts_no_blocks_tells_nothing(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_mlx(portable(block(0, "q")), tmp_path / "a", base=blueprint(tmp_path))
    assert files(tmp_path / "a")[1]["lora_parameters"]["keys"] == [block(0, "q")]


def test_embeddings_are_told_by_name(tmp_path: Path):
    write_mlx(portable("model.embed_tokens", "model.layers.0.q"), tmp_path / "a")
    alone = read_mlx(tmp_path / "a")
    assert alone.embeddings == {"model.embed_tokens"}
    assert "mlx-lm applied the update to both ends" in alone.notes[0]
    for tied in (False, True):
        base = blueprint(config_of(tmp_path, 1, tie_word_embeddings=tied))
        assert read_mlx(tmp_path / "a", base=base).adapter.method.tied is tied
