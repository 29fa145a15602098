"""Architectures of transformers: what is found in each, and an adapter's whole life."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn

import rankwise as rw
from architectures import (
    ARCHITECTURES,
    CLIP,
    CLIP_TEXT,
    T5,
    TEXT,
    WHISPER,
    WORDS,
    Architecture,
    spelled,
)
from rankwise.layers import LoRALayer
from rankwise.methods.lora import default_targets
from rankwise.targets import find_head, select


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


# --- what is found -------------------------------------------------------------------------------


def test_the_head_is_found_and_trains_where_it_is_fresh(architecture: Architecture):
    model = architecture.fresh()
    head = find_head(model)
    assert (head.names, head.kind) == (architecture.head, architecture.kind)
    plan = rw.LoRA(r=2).plan(model)
    fresh = architecture.head if architecture.kind == "classification" else ()
    assert tuple(p.site.name for p in plan.placements) == fresh
    assert any("Trained whole" in note for note in plan.notes) == bool(fresh)


def test_query_and_value_are_found(architecture: Architecture):
    model = architecture.fresh()
    found = [target.name for target in select(model, default_targets(model))]
    assert sorted(found) == sorted(architecture.default)
    theirs = PEFT_DEFAULTS.get(model.config.model_type)
    if theirs is not None:
        ends = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in theirs]
        assert sorted(found) == sorted(ends)


def test_all_linear_is_every_linear_layer_outside_the_head(architecture: Architecture):
    found = [target.name for target in select(architecture.fresh(), ["all-linear"])]
    assert sorted(found) == sorted([*architecture.default, *architecture.linear])


@pytest.mark.parametrize(
    ("build", "head", "kind"),
    [
        (
            lambda: hf.WhisperForAudioClassification(hf.WhisperConfig(**WHISPER)),
            ("projector", "classifier"),
            "classification",
        ),
        (
            lambda: hf.CLIPForImageClassification(hf.CLIPConfig(**CLIP)),
            ("classifier",),
            "classification",
        ),
        (
            lambda: hf.T5ForSequenceClassification(hf.T5Config(**T5, eos_token_id=1)),
            ("classification_head",),
            "classification",
        ),
        (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), (), "none"),
        (lambda: hf.WhisperModel(hf.WhisperConfig(**WHISPER)), (), "none"),
        (lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**CLIP_TEXT)), (), "none"),
    ],
)
def test_heads_beside_models_without_the_usual_prefix(
    build: Callable[[], nn.Module], head: tuple[str, ...], kind: str
):
    found = find_head(build())
    assert (found.names, found.kind) == (head, kind)


def test_the_head_of_a_user_s_own_class_is_what_hangs_beside_the_model_in_it():
    class Ranker(hf.PreTrainedModel):
        config_class = hf.BertConfig

        def __init__(self, config: hf.BertConfig) -> None:
            super().__init__(config)
            self.backbone = hf.BertModel(config)
            self.dropout = nn.Dropout(0.1)
            self.judge = nn.Linear(16, 1)

    head = find_head(Ranker(hf.BertConfig(**TEXT)))
    assert (head.names, head.kind) == (("judge",), "classification")


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (
            lambda: hf.LongT5ForConditionalGeneration(hf.LongT5Config(**T5)),
            spelled(
                "encoder.block.{0,1}.layer.0.LocalSelfAttention.{q,v}",
                "decoder.block.{0,1}.layer.{0.Self,1.EncDec}Attention.{q,v}",
            ),
        ),
        (
            lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)),
            spelled("encoder.layer.{0,1}.attention.attn.{q,v}"),
        ),
    ],
    ids=["long-t5", "mpnet"],
)
def test_query_and_value_of_single_letters_are_found(
    model: Callable[[], nn.Module], found: list[str]
):
    built = model()
    assert sorted(t.name for t in select(built, default_targets(built))) == sorted(found)


# --- the life of an adapter ----------------------------------------------------------------------


def train(architecture: Architecture, model: Any) -> set[str]:
    """One step of training on the model's own loss; the names of the parameters that changed."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0)
    model.train()
    loss = model(**architecture.batch).loss
    loss.backward()
    optimizer.step()
    model.eval()
    assert loss.isfinite()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def live(architecture: Architecture, method: rw.LoRA, folder: Path) -> tuple[Any, rw.Certificate]:
    """Attach, train, save, load on a fresh base, merge; gives the merged model and certificate."""
    model = architecture.fresh()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    plain = architecture.run(model)
    record = rw.attach(model, method)
    assert torch.equal(architecture.run(model), plain)
    changed = train(architecture, model)
    moved = [n for n in changed if ".updates." in n]  # of each update the side that starts at zero
    assert len(moved) == len(record.adapted)
    assert all(
        n.endswith(".lora_A" if "embed_tokens" in n or "wte" in n else ".lora_B") for n in moved
    )
    heads = tuple(f"{name}." for name in record.copies)
    assert all(n.startswith(heads) for n in changed if ".updates." not in n)
    adapted = architecture.run(model)
    assert not torch.allclose(adapted, plain, atol=1e-3)

    rw.save_adapter(model, folder / "adapter")
    again = architecture.fresh()
    rw.load_adapter(again, folder / "adapter")
    assert torch.equal(architecture.run(again), adapted)

    probe = {k: v for k, v in architecture.batch.items() if k not in ("labels", "return_loss")}
    certificate = rw.merge(model, keep=False, probe=probe)
    assert certificate.passed
    assert certificate.outputs is not None
    assert certificate.outputs.effect > 1e3 * certificate.outputs.error
    assert not any(isinstance(m, LoRALayer) for m in model.modules())
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    torch.testing.assert_close(architecture.run(model), adapted, rtol=1e-4, atol=1e-4)
    return model, certificate


def saved_and_loaded(model: Any, folder: Path) -> Any:
    """The model as transformers alone writes and reads it."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["query and value", "all-linear"])
def test_an_adapter_lives_from_its_plan_to_a_plain_merged_model(
    architecture: Architecture, targets: str | None, tmp_path: Path
):
    merged, certificate = live(architecture, rw.LoRA(r=2, target_modules=targets), tmp_path)
    wanted = [*architecture.default, *(architecture.linear if targets else ())]
    assert sorted(layer.name for layer in certificate.layers) == sorted(wanted)
    again = saved_and_loaded(merged, tmp_path / "merged")
    assert torch.equal(architecture.run(again), architecture.run(merged))


# --- experts -------------------------------------------------------------------------------------

EXPERTS = rw.LoRA(r=2, target_modules=["experts.gate_up_proj", "experts.down_proj"])


def test_the_banks_of_mixtral_s_experts_are_adapted_by_name(tmp_path: Path):
    architecture = ARCHITECTURES["mixtral"]
    merged, _ = live(architecture, EXPERTS, tmp_path)
    again = saved_and_loaded(merged, tmp_path / "merged")
    assert torch.equal(architecture.run(again), architecture.run(merged))


def test_every_expert_of_mixtral_has_factors_of_its_own():
    architecture = ARCHITECTURES["mixtral"]
    model = architecture.fresh()
    banks = {n: p.detach().clone() for n, p in model.named_parameters() if ".experts." in n}
    rw.attach(model, EXPERTS)
    train(architecture, model)
    adapter = rw.adapter_of(model)
    assert {n: (f.A.shape, f.B.shape) for n, f in adapter.factors.items()} == {
        f"model.layers.{i}.mlp.experts.{name}": shapes
        for i in range(2)
        for name, shapes in {
            "gate_up_proj": ((3, 2, 16), (3, 48, 2)),
            "down_proj": ((3, 2, 24), (3, 16, 2)),
        }.items()
    }
    rw.merge(model, keep=False)
    for name, factors in adapter.factors.items():
        for expert, weight in enumerate(banks[name].numpy()):
            wanted = weight + 2 * factors.B[expert].numpy() @ factors.A[expert].numpy()
            found = model.get_parameter(name)[expert]
            torch.testing.assert_close(found, torch.from_numpy(wanted))


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
def test_each_of_transformers_ways_to_run_experts_reads_the_updates(kernel: str):
    architecture = ARCHITECTURES["mixtral"]
    model = architecture.fresh()
    rw.attach(model, EXPERTS)
    train(architecture, model)
    eager = architecture.run(model)
    model.set_experts_implementation(kernel)
    torch.testing.assert_close(architecture.run(model), eager)


def test_all_linear_says_that_it_leaves_the_experts():
    model = ARCHITECTURES["mixtral"].fresh()

    def told(**options: Any) -> list[str]:
        notes = rw.LoRA(r=2, **options).plan(model).notes
        return [note for note in notes if "all-linear" in note]

    (note,) = told(target_modules="all-linear")
    assert "leaves 4 bank(s) of weights frozen" in note
    assert "'model.layers.0.mlp.experts.gate_up_proj'" in note
    assert note.endswith("target_modules: experts.gate_up_proj, experts.down_proj.")
    (note,) = told(target_modules="all-linear", layers=[1])
    assert "leaves 2 bank(s)" in note
    assert told(target_modules=["all-linear", *EXPERTS.target_modules]) == []
    assert told(target_modules="all-linear", exclude_modules=["experts"]) == []
    assert told() == []


# --- layers with a forward of their own ----------------------------------------------------------

FALCON = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_all_linear_says_why_no_layer_can_be_adapted():
    model = hf.ResNetModel(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    )
    with pytest.raises(rw.UserError, match="no Linear layer outside its output layer"):
        rw.LoRA(r=2, target_modules="all-linear").plan(model)


# --- tied embeddings -----------------------------------------------------------------------------

TIED = {
    "gpt2": ("transformer.wte", ["lm_head"]),
    "qwen3": ("model.embed_tokens", ["lm_head"]),
    "whisper": ("model.decoder.embed_tokens", ["proj_out"]),
    "t5": ("decoder.embed_tokens", ["shared", "encoder.embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("name", list(TIED))
def test_an_update_of_a_tied_embedding_parts_it_and_says_so(name: str, tmp_path: Path):
    architecture, (embedding, others) = ARCHITECTURES[name], TIED[name]
    method = rw.LoRA(r=2, target_modules=[embedding])
    (note,) = method.plan(architecture.fresh()).notes
    assert note == (
        f"'{embedding}' shares its weight with {', '.join(others)}: the update applies to "
        f"'{embedding}' only, and merging gives it a weight of its own (tied=True puts it on both)."
    )
    merged, certificate = live(architecture, method, tmp_path)
    assert set(certificate.untied) == {embedding, *others}
    weight = merged.get_submodule(embedding).weight
    assert not any(torch.equal(merged.get_submodule(o).weight, weight) for o in others)
    merged.config.tie_word_embeddings = False
    again = saved_and_loaded(merged, tmp_path / "merged")
    assert torch.equal(architecture.run(again), architecture.run(merged))


@pytest.mark.parametrize("name", list(TIED))
def test_an_update_on_both_ends_of_a_tie_keeps_it(name: str, tmp_path: Path):
    architecture, (embedding, others) = ARCHITECTURES[name], TIED[name]
    method = rw.LoRA(r=2, target_modules=[embedding], tied=True)
    assert method.plan(architecture.fresh()).notes == ()
    merged, certificate = live(architecture, method, tmp_path)
    assert certificate.untied == ()
    weight = merged.get_submodule(embedding).weight
    assert all(merged.get_submodule(other).weight is weight for other in others)
    again = saved_and_loaded(merged, tmp_path / "merged")
    assert torch.equal(architecture.run(again), architecture.run(merged))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"], "tied": True},
    ],
    ids=str,
)
def test_gemma_s_embedding_multiplies_and_its_update_with_it(
    options: dict[str, Any], tmp_path: Path
):
    architecture = ARCHITECTURES["gemma3"]
    assert architecture.fresh().get_input_embeddings().embed_scale != 1
    _, certificate = live(architecture, rw.LoRA(r=2, **options), tmp_path)
    assert bool(certificate.untied) == ("tied" not in options)


def test_falcon_s_own_linear_layers_are_plain_ones(tmp_path: Path):
    model = hf.FalconForCausalLM(hf.FalconConfig(**FALCON)).eval()
    ids = torch.tensor([[3, 5, 7, 2]])
    before = model(ids).logits
    record = rw.attach(model, rw.LoRA(r=2, target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in record.adapted} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    changed = model(ids).logits.detach()
    assert rw.merge(model, keep=False, probe=ids).passed
    torch.testing.assert_close(model(ids).logits, changed, rtol=1e-4, atol=1e-4)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
