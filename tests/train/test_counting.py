"""Counts: the paper's numbers, models that are really adapted, files that are really written."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    OPTConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

import rankwise
from rankwise.errors import UserError
from rankwise.inits import OLoRA, PiSSA
from rankwise.lowrank import count
from rankwise.train.config import make_config
from rankwise.train.counting import METHODS, ModelCount, count_model


def counted(model: str | Path, labels: int = 2, methods: Any = METHODS, **options: Any) -> Any:
    values = {"model": str(model), "data": "", "out": "", **options}
    return count_model(make_config(values, "test"), labels, methods)


def of(made: ModelCount, method: str) -> Any:
    return next(each for each in made.methods if each.method == method)


def test_one_layer_of_4096_by_formula_and_by_counting() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False))
    rankwise.attach(model, rankwise.LoRA(r=8, target_modules=["0"], head="freeze"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count(4096, 4096, 8) == trained == 65_536
    assert 4096 * 4096 == 16_777_216 == 256 * trained


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of roberta-base."""
    file = tmp_path_factory.mktemp("roberta") / "config.json"
    RobertaConfig(
        vocab_size=50265,
        hidden_size=768,
        num_hidden_layers=12,
        max_position_embeddings=514,
        type_vocab_size=1,
    ).to_json_file(file)
    return file


def test_roberta_base(roberta: Path) -> None:
    made = counted(roberta, 3, r=8, target_modules=["query", "value"])
    lora = of(made, "lora")
    assert lora.formula == lora.adapter == 294_912
    assert lora.head == 592_899
    assert lora.trained == 887_811
    assert made.base == 124_647_939
    assert lora.share == 887_811 / 124_647_939
    assert of(made, "head").trained == 592_899
    assert of(made, "full").trained == 124_647_939
    assert [(s.layers, s.out_features, s.in_features, s.r) for s in made.shapes] == [
        (24, 768, 768, 8)
    ]
    assert made.shapes[0].dense / made.shapes[0].update == 48


def test_the_base_is_the_encoder_without_its_pooler_and_the_head(roberta: Path) -> None:
    """What 124,647,939 counts, as transformers builds it."""
    config = RobertaConfig.from_json_file(roberta)
    config.num_labels = 3
    with torch.device("meta"):
        encoder = RobertaModel(config, add_pooling_layer=False)
        head = RobertaForSequenceClassification(config).classifier
    sizes = [sum(p.numel() for p in module.parameters()) for module in (encoder, head)]
    assert sizes == [124_055_040, 592_899]
    assert sum(sizes) == 124_647_939


@pytest.mark.slow
def test_gpt_3(tmp_path: Path) -> None:
    """96 layers of 12,288; OPT has GPT-3's shape and a config in transformers."""
    OPTConfig(
        hidden_size=12288,
        word_embed_proj_dim=12288,
        ffn_dim=4 * 12288,
        num_hidden_layers=96,
        num_attention_heads=96,
        architectures=["OPTForCausalLM"],
    ).to_json_file(tmp_path / "gpt3.json")
    made = counted(
        tmp_path / "gpt3.json", methods=["lora"], r=4, target_modules=["q_proj", "v_proj"]
    )
    lora = of(made, "lora")
    assert lora.formula == lora.adapter == lora.trained == 96 * 2 * 4 * 2 * 12288
    assert round(lora.trained / 1e6, 1) == 18.9
    assert lora.head == 0
    assert 174e9 < made.base < 176e9


# --- against a model that is really made, and a file that is really written -----------------------

STARTS = {"pissa": PiSSA(), "olora": OLoRA()}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["all-linear"], "r": 3},
    {"target_modules": ["query", "dense"], "rank_pattern": {"query": 2}},
    {"target_modules": ["word_embeddings"]},
    {"dora": True},
    {"freeze_a": True},
    {"bias": "adapted"},
    {"bias": "all"},
    {"init": "pissa"},
    {"init": "olora", "dora": True},
    {"modules_to_save": ["pooler"]},
    {"head": "freeze"},
]


def tensor_bytes(file: Path) -> int:
    """What a safetensors file holds besides its header."""
    content = file.read_bytes()
    return len(content) - 8 - struct.unpack("<Q", content[:8])[0]


def really(bert: Path, method: Any) -> Any:
    """The tiny BERT with a head for three classes, adapted."""
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    rankwise.attach(model, method)
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lora_is_what_is_attached_and_what_is_saved(
    bert: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    values = {"r": 4, "target_modules": ["query", "value"], **options}
    made = counted(bert, 3, ["lora"], **values)
    named = {"freeze_a": "freeze_A"}
    given = {named.get(k, k): STARTS.get(v, v) if k == "init" else v for k, v in values.items()}
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = really(bert, rankwise.LoRA(**given))
    lora = of(made, "lora")
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert made.base == sum(p.numel() for p in base.parameters())
    assert lora.trained == lora.adapter + lora.head == trains
    if "bias" not in options:
        assert lora.formula == lora.adapter
    file = rankwise.save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors"
    assert lora.file_bytes == tensor_bytes(file)
    assert lora.file_bytes < file.stat().st_size < lora.file_bytes + 15_000
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([1])).loss
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    loss.backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert lora.gradient_bytes == sum(g.nbytes for g in gradients)
    assert lora.optimizer_bytes == sum(t.nbytes for t in states)


@pytest.mark.parametrize(
    ("word", "method", "added"),
    [
        ("head", rankwise.HeadOnly(), 0),
        ("full", rankwise.Full(), 0),
        ("bitfit", rankwise.BitFit(), None),
        ("bottleneck", rankwise.Bottleneck(5), None),
        ("bottleneck", rankwise.Bottleneck(5, rankwise.Pfeiffer()), None),
        ("prefix", rankwise.PrefixTuning(3), 2 * 2 * 3 * 32),
    ],
    ids=str,
)
def test_the_other_methods_are_what_is_attached_and_what_is_saved(
    bert: Path, tmp_path: Path, word: str, method: Any, added: int | None
) -> None:
    place = "pfeiffer" if "Pfeiffer" in str(method) else None
    sizes = {"adapter_size": 5, "prefix_length": 3, "adapter_placement": place}
    made = of(counted(bert, 3, [word], **sizes), word)
    model = really(bert, method)
    assert made.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert made.formula is None
    assert made.adapter == (made.trained - made.head if added is None else added)
    file = rankwise.save_adapter(model, tmp_path / "saved") / "trained.safetensors"
    assert made.file_bytes == tensor_bytes(file)


# --- all methods side by side ---------------------------------------------------------------------


def test_every_method_is_counted(bert: Path) -> None:
    made = counted(bert, target_modules=["query"])
    assert list(dict.fromkeys(each.method for each in made.methods)) == list(METHODS)
    assert made.task == "classification"
    assert any("classifier" in note for note in made.notes)


def test_bottlenecks_are_counted_in_both_ways_unless_one_is_named(bert: Path) -> None:
    both = [m for m in counted(bert, target_modules=["query"]).methods if m.method == "bottleneck"]
    assert [m.name for m in both] == ["bottleneck m=64, Houlsby", "bottleneck m=64, Pfeiffer"]
    network = 2 * 32 * 64 + 64 + 32  # two of them in each of two layers, or one
    norms = 5 * 2 * 32  # Houlsby et al. train the normalisations as well: the layers' and the first
    assert [m.adapter for m in both] == [4 * network + norms, 2 * network]
    named = counted(bert, target_modules=["query"], adapter_placement="pfeiffer").methods
    assert [m for m in named if m.method == "bottleneck"] == [both[1]]


def test_layers_of_one_shape_are_told_together(bert: Path) -> None:
    made = counted(bert, target_modules=["query", "value", "output.dense"])
    assert [(s.layers, s.out_features, s.in_features) for s in made.shapes] == [
        (6, 32, 32),
        (2, 32, 64),
    ]
    assert sum(s.layers * s.update for s in made.shapes) == of(made, "lora").adapter


def test_a_target_without_a_match_is_an_error(bert: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'query'"):
        counted(bert, target_modules=["qury"])


def test_modules_that_train_whole_are_counted_with_the_head(bert: Path) -> None:
    made = counted(bert, modules_to_save=["pooler"], target_modules=["query"])
    pooler = 32 * 32 + 32
    assert of(made, "lora").head == of(made, "head").head == 2 * 32 + 2 + pooler


def test_a_method_that_the_model_cannot_have_is_told_and_the_others_are_counted(
    bert: Path,
) -> None:
    made = counted(bert, methods=["head", "full"], modules_to_save=["poler"])
    assert [each.method for each in made.methods] == ["full"]
    assert made.notes[0].startswith("head-only: modules_to_save: 'poler' matches no module")
    with pytest.raises(UserError, match="'poler' matches no module"):
        counted(bert, methods=["head"], modules_to_save=["poler"])
