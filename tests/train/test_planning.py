import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.errors import UserError
from rankwise.train.config import FitConfig, make_config
from rankwise.train.planning import plan_model

# The shape of roberta-base; Hu et al. 2021 count 0.3 M for r=8 on query and value (table 2).
ROBERTA_BASE = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}

Plan = Callable[..., Any]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Plan a method on an architecture of which only the config and an empty weights file exist."""
    import transformers

    def make(kind: str, shape: dict[str, Any], labels: int = 2, **options: Any) -> Any:
        folder = tmp_path / kind
        config: Any = getattr(transformers, f"{kind}Config")(**shape)
        config.architectures = [options.pop("architecture", f"{kind}ForMaskedLM")]
        config.save_pretrained(folder)
        (folder / "model.safetensors").touch()
        values = {"model": str(folder), "data": "", "out": "", **options}
        return plan_model(make_config(values, "test"), labels)

    return make


def test_roberta_base_with_r_8_on_query_and_value(plan: Plan) -> None:
    made = plan("Roberta", ROBERTA_BASE, r=8, target_modules="query,value")
    assert made.counts["adapter"] == made.counts["adapter_formula"] == 12 * 2 * 8 * (768 + 768)
    assert made.counts["adapter"] == 294_912
    dense, out = 768 * 768 + 768, 2 * 768 + 2
    assert made.counts["head"] == dense + out
    assert made.counts["trainable"] == 294_912 + dense + out
    assert [layer.name for layer in made.layers[:2]] == [
        "roberta.encoder.layer.0.attention.self.query",
        "roberta.encoder.layer.0.attention.self.value",
    ]
    assert {(x.type, x.shape, x.r, x.alpha, x.scale) for x in made.layers} == {
        ("Linear", (768, 768), 8, 16.0, 2.0)
    }


def test_no_weight_is_made(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 billion parameters, more than this machine could hold, are planned in a moment."""
    large = {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
    }
    made = plan("Llama", large, architecture="LlamaForCausalLM", r=16)
    assert made.counts["base"] == 68_976_648_192
    # q_proj is 8192 by 8192, v_proj 1024 by 8192
    assert made.counts["adapter"] == 80 * 16 * ((8192 + 8192) + (1024 + 8192))
    assert made.memory["base_bfloat16"] == 2 * 68_976_648_192
    assert made.memory["optimizer"] == 8 * made.counts["adapter"]


GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}
DISTILBERT = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("kind", "architecture", "shape", "targets"),
    [
        ("Bert", "BertForMaskedLM", SMALL, {"query", "value"}),
        ("GPT2", "GPT2LMHeadModel", GPT2, {"c_attn"}),
        ("Llama", "LlamaForCausalLM", SMALL, {"q_proj", "v_proj"}),
        ("DistilBert", "DistilBertForMaskedLM", DISTILBERT, {"q_lin", "v_lin"}),
        ("T5", "T5ForConditionalGeneration", T5, {"q", "v"}),
    ],
)
def test_the_default_is_query_and_value_whatever_they_are_called(
    plan: Plan, kind: str, architecture: str, shape: dict[str, Any], targets: set[str]
) -> None:
    made = plan(kind, shape, architecture=architecture)
    assert {layer.name.rpartition(".")[2] for layer in made.layers} == targets


def test_conv1d_is_shown_by_its_function(plan: Plan) -> None:
    made = plan("GPT2", GPT2 | {"n_layer": 1}, architecture="GPT2LMHeadModel", r=4)
    assert [(x.type, x.shape, x.parameters) for x in made.layers] == [("Conv1D", (48, 16), 4 * 64)]
    assert "Task: causal-lm." in made.notes
    assert made.counts["head"] == 0


def test_all_linear_leaves_the_head_out(plan: Plan) -> None:
    made = plan("Bert", SMALL, target_modules="all-linear", r=2)
    ends = {layer.name.rpartition("bert.")[2] for layer in made.layers}
    assert "pooler.dense" in ends
    assert not any("classifier" in layer.name for layer in made.layers)
    each = 4 * 2 * (16 + 16) + 2 * 2 * (16 + 24)
    assert made.counts["adapter"] == 2 * each + 2 * (16 + 16)


def test_patterns_of_rank_and_alpha(plan: Plan) -> None:
    made = plan("Bert", SMALL, r=2, alpha=6, rank_pattern="value=4", alpha_pattern="query=1")
    assert {(x.name.rpartition(".")[2], x.r, x.alpha, x.scale) for x in made.layers} == {
        ("query", 2, 1.0, 0.5),
        ("value", 4, 6.0, 1.5),
    }


def test_classes_set_the_size_of_the_head(plan: Plan) -> None:
    assert plan("Bert", SMALL, 7).counts["head"] == 7 * 16 + 7
    assert plan("Bert", SMALL, task="regression").counts["head"] == 17


@pytest.mark.parametrize(("method", "trained"), [("head", 2 * 16 + 2), ("full", None)])
def test_methods_without_updates(plan: Plan, method: str, trained: int | None) -> None:
    made = plan("Bert", SMALL, method=method)
    assert made.layers == ()
    assert made.counts["trainable"] == (trained or made.counts["base"])


def test_a_target_that_is_not_there(plan: Plan) -> None:
    with pytest.raises(UserError, match="Did you mean 'query'"):
        plan("Bert", SMALL, target_modules="querry")


def tensor_bytes(file: Path) -> int:
    """What a safetensors file holds besides its header."""
    content = file.read_bytes()
    return len(content) - 8 - struct.unpack("<Q", content[:8])[0]


def test_the_plan_is_what_a_run_does(
    options: Callable[..., FitConfig], finished: Callable[[str], Path], look: Any
) -> None:
    for kind in ("single", "llama", "tied", "head", "full"):
        manifest = look.manifest(finished(kind))
        config = make_config(manifest["config"] | {"task": manifest["task"]}, "test")
        made = plan_model(config, len(manifest["label_names"]) or 2)
        assert made.counts == manifest["counts"], kind
        (file,) = (finished(kind) / "adapter").glob("*.safetensors")
        assert made.memory["adapter_file"] == tensor_bytes(file), kind
        assert [x.name for x in made.layers] == manifest["method"]["adapted"]


def test_the_generators_are_left_alone(plan: Plan) -> None:
    before = torch.get_rng_state()
    plan("Bert", SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_without_weights_is_enough(plan: Plan, tmp_path: Path) -> None:
    planned = plan("Bert", SMALL)
    (tmp_path / "Bert" / "model.safetensors").unlink()
    config = make_config({"model": str(tmp_path / "Bert"), "data": "", "out": ""}, "test")
    assert plan_model(config).counts == planned.counts
