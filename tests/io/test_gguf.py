"""GGUF adapters: names by gguf's own map, rotary rows by the attention they give, read by gguf."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from foreign import our_outputs, peft_folder, peft_outputs, same_deltas
from rankwise.errors import ArtifactError, EnvironmentFault, UserError
from rankwise.io.blueprint import Blueprint, blueprint
from rankwise.io.gguf import read_gguf, write_gguf
from rankwise.io.peft_alone import read_peft_alone, write_peft_alone
from rankwise.io.portable import Portable, assemble
from rankwise.lowrank import Factors

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base(folder: Path, kind: str = "llama", **more: Any) -> Blueprint:
    said = {"model_type": kind, "num_attention_heads": 4, "num_key_value_heads": 2, **more}
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return blueprint(folder)


def portable(*names: str, r: int = 2, scale: float = 3.0, out: int = 16) -> Portable:
    return Portable(
        assemble({n: Factors(torch.randn(r, 5), torch.randn(out, r), scale) for n in names})
    )


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_by_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return fields, {t.name: t.data for t in reader.tensors}


@pytest.mark.parametrize(
    ("kind", "architecture"), [("llama", "LLAMA"), ("qwen2", "QWEN2"), ("qwen3", "QWEN3")]
)
def test_the_names_are_those_of_the_package(kind: str, architecture: str, tmp_path: Path):
    inner = [f"self_attn.{n}" if n[0] in "qkvo" else f"mlp.{n}" for n in LAYERS]
    names = [f"model.layers.{i}.{n}" for i in (0, 11) for n in inner]
    names += ["model.embed_tokens", "lm_head"]
    write_gguf(portable(*names), tmp_path / "x.gguf", base=base(tmp_path, kind))
    fields, tensors = read_by_gguf(tmp_path / "x.gguf")
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), 12)
    want = {f"{known.get_name(n)}.weight.lora_{s}" for n in names for s in "ab"}
    assert set(tensors) == want
    assert fields == {
        "general.architecture": kind,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }


def test_shapes_are_pefts_but_for_the_token_embedding(tmp_path: Path):
    made = portable("model.embed_tokens", "model.layers.0.mlp.up_proj")
    write_gguf(made, tmp_path / "x.gguf", base=base(tmp_path))
    tensors = read_by_gguf(tmp_path / "x.gguf")[1]
    f = made.factors["model.layers.0.mlp.up_proj"]
    assert np.array_equal(tensors["blk.0.ffn_up.weight.lora_a"], f.A.numpy())
    assert np.array_equal(tensors["blk.0.ffn_up.weight.lora_b"], f.B.numpy())
    f = made.factors["model.embed_tokens"]
    assert np.array_equal(tensors["token_embd.weight.lora_a"], f.A.T.numpy())
    assert np.array_equal(tensors["token_embd.weight.lora_b"], f.B.numpy())
    assert all(t.dtype == np.float32 for t in tensors.values())


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": list(LAYERS)},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": list(LAYERS),
            "rank_pattern": {"q_proj": 2},
            "use_rslora": True,
        },
        {"r": 4, "lora_alpha": 8, "target_modules": list(LAYERS), "alpha_pattern": {"o_proj": 3}},
    ],
)
def test_logits_are_the_same_after_the_way_there_and_back(
    config: dict[str, Any], llama: Path, tmp_path: Path
):
    want, plain = peft_folder(llama, tmp_path / "p", **config)
    at = blueprint(llama)
    write_gguf(read_peft_alone(tmp_path / "p"), tmp_path / "x.gguf", base=at)
    back = read_gguf(tmp_path / "x.gguf", base=at)
    assert (our_outputs(llama, back) - want).abs().max() < 1e-6
    write_peft_alone(back, tmp_path / "b")
    assert (peft_outputs(llama, tmp_path / "b") - want).abs().max() < 1e-6
    assert (want - plain).abs().max() > 1e-2


def test_one_alpha_is_divided_by_each_rank(tmp_path: Path):
    own = {
        **portable("model.layers.0.mlp.up_proj", r=2, scale=4.0).factors,
        **portable("model.layers.0.mlp.down_proj", r=4, scale=2.0).factors,
    }
    made = Portable(assemble(own))
    written = write_gguf(made, tmp_path / "x.gguf", base=base(tmp_path))
    assert written.notes == ("gguf: architecture llama, adapter.lora.alpha 8",)
    assert same_deltas(read_gguf(tmp_path / "x.gguf"), made, 0)


def test_an_alpha_of_zero_is_a_scale_of_one(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 5), np.float16))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ones((6, 2), np.float32))
    finish(writer)
    f = read_gguf(tmp_path / "x.gguf").factors["model.layers.0.self_attn.q_proj"]
    assert (f.r, f.scale, f.A.dtype) == (2, 1.0, torch.float32)


def test_the_heads_of_a_llama_must_be_known(tmp_path: Path):
    write_gguf(
        portable("model.layers.0.self_attn.q_proj"), tmp_path / "x.gguf", base=base(tmp_path)
    )
    with pytest.raises(UserError, match=r"rows GGUF has in another order by head.*--base"):
        read_gguf(tmp_path / "x.gguf")
    with pytest.raises(ArtifactError, match="which are no 5 heads"):
        read_gguf(tmp_path / "x.gguf", base=base(tmp_path, num_attention_heads=5))
    whole = {"num_attention_heads": 4, "num_key_value_heads": None}
    assert read_gguf(tmp_path / "x.gguf", base=base(tmp_path, **whole)).factors


@pytest.mark.parametrize(
    ("names", "config", "told"),
    [
        (("model.layers.0.mlp.experts.3.up_proj",), {}, "is no layer that is known here"),
        (
            ("model.layers.0.mlp.up_proj",),
            {"model_type": "gpt2"},
            "model_type 'gpt2'.*--for llama.cpp",
        ),
        (("model.embed_tokens",), {"tie_word_embeddings": True}, "shares its weight"),
        (("lm_head",), {"tie_word_embeddings": True}, "shares its weight"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(
    names: tuple[str, ...], config: dict[str, Any], told: str, tmp_path: Path
):
    with pytest.raises(UserError, match=told):
        write_gguf(portable(*names), tmp_path / "x.gguf", base=base(tmp_path, **config))
    assert not (tmp_path / "x.gguf").exists()


def test_magnitudes_and_heads_are_refused(tmp_path: Path):
    f = portable("model.layers.0.mlp.up_proj").factors
    extra = {"modules": ["score"], "magnitudes": {"model.layers.0.mlp.up_proj": torch.ones(16)}}
    with pytest.raises(UserError, match=r"(?s)llama\.cpp has no DoRA.*trained whole \('score'\)"):
        write_gguf(Portable(assemble(f, **extra)), tmp_path / "x.gguf", base=base(tmp_path))


@pytest.mark.parametrize(
    ("alpha", "more", "told"),
    [
        (float("nan"), {}, "is no number of 0 or more"),
        (-1.0, {}, "is no number of 0 or more"),
        (1.0, {"tokens": True}, "is an activated LoRA"),
        (1.0, {"dims": 3}, "has 3 dimensions"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(
    alpha: float, more: dict[str, Any], told: str, tmp_path: Path
):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if "tokens" in more:
        writer.add_array("adapter.alora.invocation_tokens", [1, 2])
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2,) * more.get("dims", 2), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ones((6, 2), np.float32))
    finish(writer)
    with pytest.raises(ArtifactError, match=told):
        read_gguf(tmp_path / "x.gguf")


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    made = portable("model.layers.0.mlp.up_proj")
    write_gguf(made, tmp_path / "x.gguf", base=base(tmp_path))
    return (tmp_path / "x.gguf").read_bytes()


@pytest.mark.parametrize("cut", [0, 3, 10, 23, 24, 60, 120, 200, -1, -40])
def test_a_truncated_file_is_damaged(whole: bytes, cut: int, tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(whole[:cut])
    with pytest.raises(ArtifactError):
        read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b"GGUF", b"GGML", "is no GGUF file"),
        (b"general.type", b"general.tipe", "general.type is None"),
        (b"ffn_up", b"ffn_xx", "is no A or B of a layer"),
        (b"llama", b"bloom", "general.architecture is 'bloom'"),
        (b"llama", b"\xffama!", "general.architecture is None"),
        (b"lora_b", b"lora_a", "gguf cannot read it|occurs|has no B"),
    ],
)
def test_a_changed_file_is_refused(whole: bytes, old: bytes, new: bytes, told: str, tmp_path: Path):
    assert old in whole
    (tmp_path / "x.gguf").write_bytes(whole.replace(old, new))
    with pytest.raises(ArtifactError, match=told):
        read_gguf(tmp_path / "x.gguf")


def test_foreign_bytes_at_the_end_are_refused(whole: bytes, tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(whole + bytes(64))
    with pytest.raises(ArtifactError, match="its tensors end at byte"):
        read_gguf(tmp_path / "x.gguf")


def test_absurd_counts_are_refused_before_they_are_believed(whole: bytes, tmp_path: Path):
    huge = whole[:8] + (1 << 40).to_bytes(8, "little") + whole[16:]
    (tmp_path / "x.gguf").write_bytes(huge)
    with pytest.raises(ArtifactError, match="announces 1,099,511,627,776 entries"):
        read_gguf(tmp_path / "x.gguf")


def test_numbers_that_are_not_finite_are_refused_unless_allowed(tmp_path: Path):
    made = portable("model.layers.0.mlp.up_proj")
    made.factors["model.layers.0.mlp.up_proj"].A[0, 0] = torch.inf
    write_gguf(made, tmp_path / "x.gguf", base=base(tmp_path))
    with pytest.raises(ArtifactError, match="has 1 of 10 NaN or infinite"):
        read_gguf(tmp_path / "x.gguf")
    assert read_gguf(tmp_path / "x.gguf", allow_nonfinite=True).factors


def test_without_the_package_it_says_how_to_get_it(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert whole
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r'pip install "rankwise\[gguf\]"'):
        read_gguf(tmp_path / "x.gguf")
