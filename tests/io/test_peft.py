"""PEFT's folder: the round trip, and what is written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import peft_models
import rankwise as rw
from rankwise.errors import ArtifactError, UserError
from rankwise.inits import PiSSA
from rankwise.io.adapters import load_adapter, save_adapter
from rankwise.io.base import base_of
from rankwise.io.peft import peft_config, read_peft, write_peft
from rankwise.methods.adapter import Adapter, adapter_of
from zoo import EVERYTHING, IDS, Zoo

METHODS = {
    "plain": rw.LoRA(r=2, target_modules=["query"], head="train"),
    "frozen head": rw.LoRA(r=2, target_modules=["query"], head="freeze"),
    "look-alike": rw.LoRA(r=2, target_modules=["^fc$"], head="freeze"),
    "all but one": rw.LoRA(r=2, target_modules=["fc"], exclude_modules=["0.fc"], head="freeze"),
    "embedding": rw.LoRA(r=3, alpha=5, target_modules=["embed", "fc"], head="train"),
    "patterns": rw.LoRA(
        r=2,
        alpha=3.5,
        target_modules=["query", "fc"],
        rank_pattern={"^fc$": 4, "1.query": 1},
        alpha_pattern={"blocks.0.fc": 0.25, "^fc$": 7},
        head="freeze",
    ),
    "stabilized": rw.LoRA(
        r=4, alpha=3, rank_stabilized=True, target_modules=["all-linear"], head="train"
    ),
    "dropout": rw.LoRA(
        r=2, target_modules=["query"], dropout=0.25, modules_to_save=["^fc$"], head="train"
    ),
}


def same(first: Adapter, second: Adapter) -> None:
    """Equal tensors, names and options; only the spelling of names may differ."""
    assert first.factors.keys() == second.factors.keys()
    for name, factors in first.factors.items():
        assert torch.equal(factors.A, second.factors[name].A)
        assert torch.equal(factors.B, second.factors[name].B)
        assert factors.scale == second.factors[name].scale
        assert first.method.spec(name) == second.method.spec(name)
    assert set(first.modules) == set(second.modules)
    mine, other = first.trained or {}, second.trained or {}
    assert mine.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("case", METHODS)
def test_what_is_written_is_read_again(tmp_path: Path, base, trained, ids, case: str):
    model = trained(METHODS[case])
    before = adapter_of(model)
    write_peft(before, tmp_path / "a", base_of(model, before))
    after = read_peft(tmp_path / "a", base())
    same(before, after)
    again = base().eval()
    rw.attach(again, after)
    assert torch.equal(again.eval()(ids), model(ids))
    second = adapter_of(again)
    write_peft(second, tmp_path / "b", base_of(again, second))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_configuration_says_everything(trained):
    adapter = adapter_of(model := trained(METHODS["patterns"]))
    assert peft_config(adapter, base_of(model, adapter, name="tiny"), revision="main") == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "tiny",
        "revision": "main",
        "r": 2,
        "lora_alpha": 3.5,
        "target_modules": ["fc", "query"],
        "exclude_modules": None,
        "rank_pattern": {"1.query": 1, "^fc": 4},
        "alpha_pattern": {"0.fc": 0.25, "^fc": 7},
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def test_the_keys_and_shapes_of_the_file(tmp_path: Path, trained):
    model = trained(rw.LoRA(r=2, target_modules=["^blocks.0.query$", "embed"], head="train"))
    path = save_adapter(model, tmp_path / "a") / "adapter_model.safetensors"
    prefix = "base_model.model."
    assert {k: tuple(t.shape) for k, t in load_file(path).items()} == {
        f"{prefix}blocks.0.query.lora_A.weight": (2, 8),
        f"{prefix}blocks.0.query.lora_B.weight": (8, 2),
        f"{prefix}embed.lora_embedding_A": (2, 20),
        f"{prefix}embed.lora_embedding_B": (8, 2),
        f"{prefix}head.weight": (3, 8),
        f"{prefix}head.bias": (3,),
    }


def test_an_adapter_that_diverged_is_not_saved(tmp_path: Path, trained):
    model = trained()
    model.blocks[0].query.update.lora_B.data[1, 1] = float("nan")
    with pytest.raises(UserError, match=r"not finite.*blocks\.0\.query\.lora_B"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_adapter_whose_method_contradicts_its_factors_is_not_saved(tmp_path: Path, trained):
    adapter = adapter_of(model := trained())
    wrong = Adapter(rw.LoRA(r=2, alpha=1, target_modules=["query"]), adapter.factors)
    with pytest.raises(UserError, match=r"rank 2 and scale 2, and its method says 2 and 0\.5"):
        write_peft(wrong, tmp_path / "a", base_of(model, wrong))


def test_names_that_peft_cannot_tell_apart_are_refused(tmp_path: Path):
    blocks = torch.nn.ModuleList(torch.nn.ModuleList([torch.nn.Linear(4, 4)]) for _ in range(3))
    model = torch.nn.Sequential(torch.nn.Identity(), blocks, torch.nn.Linear(4, 2))
    rw.attach(model, rw.LoRA(r=1, target_modules=[r"1\..*"], head="train"))
    with pytest.raises(UserError, match=r"modules_to_save \['2'\] also takes in.*'1\.2\.0'"):
        save_adapter(model, tmp_path / "a")


def look_alike() -> torch.nn.Module:
    """PEFT reads "head" as "lm_head" too."""
    torch.manual_seed(0)
    names = {"body": (4, 4), "lm_head": (4, 4), "head": (4, 2)}
    return torch.nn.ModuleDict({n: torch.nn.Linear(*s) for n, s in names.items()})


def test_a_name_that_peft_reads_twice_comes_with_both_modules(tmp_path: Path):
    model = look_alike()
    rw.attach(model, rw.LoRA(r=1, target_modules=["body"], head="train"))
    folder = save_adapter(model, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["modules_to_save"] == ["head"]
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata()["rankwise.trained"] == '["head"]'
    tensors = load_file(path)
    assert torch.equal(tensors["base_model.model.lm_head.bias"], model["lm_head"].bias)
    # Rankwise knows from the metadata that only one of them trained.
    assert list(load_adapter(look_alike(), folder).originals) == ["head"]
    other = look_alike()
    other["lm_head"].bias.data += 1
    with pytest.raises(ArtifactError, match=r"base tensor \(4,\) for 'lm_head\.bias' that is not"):
        load_adapter(other, folder)


def test_a_name_that_peft_reads_as_an_adapted_module_too_is_refused(tmp_path: Path):
    model = look_alike()
    rw.attach(model, rw.LoRA(r=1, target_modules=["lm_head"], head="train"))
    with pytest.raises(UserError, match=r"modules_to_save \['head'\] also takes in.*'lm_head'"):
        save_adapter(model, tmp_path / "a")


PARTS = {"fused": rw.Split(("q_proj", "k_proj", "v_proj"))}
EVERY = (*(name for name in EVERYTHING if name != "fused"), "fused.k_proj", "fused.q_proj")
OPTIONS = {
    "plain": {},
    "tied": {"tied": True},
    "dora": {"dora": True},
    "started": {"init": PiSSA(), "rank_stabilized": True},
    "biases and rows": {"bias": "all", "trainable_tokens": {"tokens": [3, 1]}},
}


def zoo(dtype: torch.dtype) -> Zoo:
    torch.manual_seed(1)
    return Zoo().to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_every_kind_of_weight_comes_back_to_the_last_bit(tmp_path: Path, case: str, dtype):
    method = peft_models.lora(
        *EVERY,
        split=PARTS,
        r=2,
        rank_pattern={"packed.out_proj": 4},
        alpha_pattern={"packed.v_proj": 3, "fused.q_proj": 1.7},  # scales that do not divide evenly
        **OPTIONS[case],
    )
    rw.attach(model := zoo(dtype), method)
    peft_models.randomise(model)
    folder = save_adapter(model, tmp_path / "a")
    load_adapter(again := zoo(dtype), folder)
    peft_models.same(adapter_of(again), adapter_of(model))
    assert torch.equal(again(IDS), model(IDS))


def test_an_adapter_with_biases_and_rows_loads_on_its_base_in_another_dtype(tmp_path: Path):
    options = OPTIONS["biases and rows"]
    rw.attach(model := zoo(torch.float32), peft_models.lora("keys", **options))
    peft_models.randomise(model)
    folder = save_adapter(model, tmp_path / "a")
    load_adapter(again := zoo(torch.float32).bfloat16(), folder)
    before, after = adapter_of(model), adapter_of(again)
    for name, change in before.biases.items():
        torch.testing.assert_close(after.biases[name], change, rtol=0, atol=1e-2)
