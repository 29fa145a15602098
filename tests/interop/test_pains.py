"""What users of PEFT complain of most: each complaint is made true there, and is not here.

Numbered by how often and how badly users meet them. Those about memory and time are in
test_pains_cost.py; docs/peft.md has the whole list.
"""

import copy
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.errors import ArtifactError, UserError
from twins import (
    TARGETS,
    Blocks,
    One,
    copy_over,
    relative,
    shuffle,
    shuffle_ours,
    two,
    with_peft,
    with_rankwise,
)

peft = pytest.importorskip("peft")

WEIGHTS = "adapter_model.safetensors"


def llama() -> LlamaForCausalLM:
    """A tiny Llama whose output layer is tied to its embedding."""
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


# --- 1. an adapter that is silently not, or not all, loaded --------------------------------------


def renamed(folder: Path, change: Callable[[str], str | None]) -> Path:
    """The adapter with its keys renamed, or left out where the new name is None."""
    file = folder / WEIGHTS
    tensors = {change(k): t for k, t in load_file(file).items()}
    save_file({k: t for k, t in tensors.items() if k is not None}, file, {"format": "pt"})
    return folder


CHANGES: dict[str, Callable[[str], str | None]] = {
    "another prefix": lambda key: key.replace("base_model.model.", "base_model.model.encoder."),
    "a missing tensor": lambda key: None if "blocks.1.query.lora_B" in key else key,
    "a surplus layer": lambda key: key.replace("blocks.3", "blocks.9"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_1_a_file_that_does_not_fit_is_refused_and_nothing_loaded(change: str, tmp_path: Path):
    base = Blocks()
    theirs = with_peft(base, **TARGETS)
    shuffle(theirs)
    theirs.save_pretrained(tmp_path)
    rw.load_adapter(copy.deepcopy(base), tmp_path)  # as it is, it fits
    renamed(tmp_path, CHANGES[change])
    x = torch.randn(5, 16)
    loaded = with_peft(base, **TARGETS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded.load_adapter(str(tmp_path), "again")
    loaded.set_adapter("again")
    assert not [w for w in said if "key" in str(w.message)]  # not a word
    assert relative(loaded(x), theirs(x)) > 0.01
    y = base(x)
    with pytest.raises(ArtifactError):
        rw.load_adapter(base, tmp_path)
    assert torch.equal(base(x), y)


# --- 2. typing errors in names -------------------------------------------------------------------


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "modules_to_save"])
def test_2_a_name_that_means_nothing_is_an_error_with_the_nearest_one(option: str):
    good = {**TARGETS, "head": "freeze"}
    wrong = {option: [*(good.get(option) or []), "vlaue"]}  # type: ignore[misc]
    with pytest.raises(UserError, match=r"'vlaue' matches no module.*Did you mean 'value'"):
        rw.attach(Blocks(), rw.LoRA(**{**good, **wrong}))  # type: ignore[arg-type]
    with_peft(Blocks(), **{**TARGETS, **wrong})  # not a word


# --- 3. merging that cannot be undone ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_3_unmerging_gives_every_bit_back(dtype: torch.dtype):
    base = One(nn.Linear(128, 128).to(dtype))
    weight = base.layer.weight.detach().clone()
    theirs = with_peft(base)
    shuffle(theirs)
    for _ in range(10):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    changed = theirs.base_model.model.layer.base_layer.weight != weight
    assert changed.float().mean() > 0.05
    with_rankwise(base)
    shuffle_ours(base)
    for _ in range(10):
        rw.merge(base)
        assert not torch.equal(base.layer.weight, weight)
        rw.unmerge(base)
    rw.detach(base)
    assert torch.equal(base.layer.weight, weight)


# --- 4. a head that is forgotten, or adapted in place of trained ---------------------------------


def test_4_what_becomes_of_the_output_layer_has_to_be_said():
    theirs = with_peft(Blocks(), **TARGETS)
    head = theirs.get_submodule("base_model.model.classifier")
    assert not any(p.requires_grad for p in head.parameters())  # frozen, not a word
    with pytest.raises(UserError, match=r"'classifier' would stay as it is.*head='train'"):
        rw.attach(Blocks(), rw.LoRA(**TARGETS))
    every = with_peft(Blocks(), target_modules="all-linear")
    assert hasattr(every.base_model.model.classifier, "lora_A")
    ours = with_rankwise(Blocks(), target_modules="all-linear", head="train")
    assert "classifier" not in rw.attachment(ours).adapted
    assert all(p.requires_grad for p in ours.classifier.parameters())


# --- 5. a sharded model saved empty --------------------------------------------------------------


def test_5_factors_without_numbers_are_never_written(tmp_path: Path):
    """ZeRO-3 and FSDP leave a process parameters of size 0; no process of theirs runs here."""
    base = Blocks()
    theirs, ours = with_peft(base, **TARGETS), with_rankwise(base, **TARGETS)
    for model in (theirs, ours):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.empty(0)
    with pytest.warns(UserWarning, match="invalid shape"):
        theirs.save_pretrained(tmp_path / "theirs")
    assert all(t.numel() == 0 for t in load_file(tmp_path / "theirs" / WEIGHTS).values())
    with pytest.raises(UserError, match=r"A must be \(r, in\) and B \(out, r\)"):
        rw.save_adapter(ours, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# --- 9. tied embeddings --------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True], ids=["embedding alone", "kept tied"])
def test_9_merging_into_a_tied_embedding_changes_nothing(tie: bool):
    ids = torch.randint(0, 24, (2, 9))
    base = llama()
    theirs = with_peft(base, target_modules=["embed_tokens"], ensure_weight_tying=tie)
    shuffle(theirs)
    ours = with_rankwise(base, target_modules=["embed_tokens"], tied=tie)
    shuffle_ours(ours)
    with torch.no_grad():
        before, mine = theirs(ids).logits, ours(ids).logits
        with pytest.warns(UserWarning, match="can lead to complications"):
            assert relative(theirs.merge_and_unload()(ids).logits, before) > 0.5
        certificate = rw.merge(ours, keep=False, probe={"input_ids": ids})
        assert relative(ours(ids).logits, mine) < 1e-5
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tie
    assert bool(certificate.untied) != tie


# --- 10. several adapters on one model -----------------------------------------------------------


def trains(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_10_what_acts_what_trains_and_what_was_there_are_three_things():
    base = Blocks()
    modules = {n: id(m) for n, m in base.named_modules()}
    theirs = with_peft(base, **TARGETS)
    theirs.add_adapter("second", peft.LoraConfig(r=2, **TARGETS))
    first = trains(theirs)
    theirs.set_adapter("second")
    assert trains(theirs).isdisjoint(first)  # looking at the second stops the first's training
    with pytest.warns(UserWarning, match="second time|multiple adapters"):
        peft.get_peft_model(theirs.base_model.model, peft.LoraConfig(**TARGETS))  # and goes on
    ours = with_rankwise(base, **TARGETS)
    with_rankwise(ours, "second", **TARGETS)
    both = trains(ours)
    rw.set_active(ours, "second")
    assert trains(ours) == both
    with pytest.raises(UserError, match="carries an adapter already"):
        with_rankwise(ours, **TARGETS)
    rw.detach(ours)
    assert {n: id(m) for n, m in base.named_modules()} == modules


# --- 12. saving more than the adapter, and asking the network ------------------------------------


def test_12_saving_writes_the_adapter_alone_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = llama()
    base.name_or_path = "somebody/llama"
    asked: list[object] = []
    module = sys.modules["peft.utils.save_and_load"]
    monkeypatch.setattr(module, "check_file_exists_on_hf_hub", lambda *a: bool(asked.append(a)))
    theirs = with_peft(base, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path / "query")
    assert asked  # whether somebody/llama has a config.json on the hub
    theirs = with_peft(base, target_modules=["embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    ours = with_rankwise(base, target_modules=["embed_tokens"])

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    rw.save_adapter(ours, tmp_path / "ours")
    found = {
        who: {k.rpartition(".lora_")[2] for k in load_file(tmp_path / who / WEIGHTS)}
        for who in ("theirs", "ours")
    }
    assert any("base_layer" in key for key in found["theirs"])  # the whole embedding, frozen
    assert found["ours"] == {"embedding_A", "embedding_B"}


# --- 13. combining adapters ----------------------------------------------------------------------


def test_13_the_sum_of_two_adapters_is_their_sum():
    base, x = two()
    names = {"target_modules": ["first"]}
    theirs, ours = with_peft(base, **names), with_rankwise(base, **names)
    theirs.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=10, **names))
    with_rankwise(ours, "second", **names)
    for seed, name in enumerate(("default", "second")):
        shuffle(theirs, seed, name)
        copy_over(theirs, ours, name)
    layer = theirs.base_model.model.first
    exact = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    theirs.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "linear")
    assert relative(layer.get_delta_weight("sum"), exact) > 0.5
    theirs.add_weighted_adapter(["default"], [9.0], "sum", "cat")  # the name is taken: not a word
    assert relative(layer.get_delta_weight("sum"), exact) > 0.5
    joined = rw.combine([rw.adapter_of(ours, n) for n in ("default", "second")])
    assert relative(joined.adapter.factors["first"].delta(), exact) < 1e-13
    y = ours(x)
    rw.detach(ours)
    rw.attach(ours, joined.adapter)
    assert relative(ours(x), y) < 1e-13


# --- 15. layers with holes -----------------------------------------------------------------------


def test_15_what_cannot_be_done_is_an_error_before_anything_is_touched():
    base = One(nn.Embedding(9, 12))
    for word in ("pissa", "bogus"):
        theirs = with_peft(base, init_lora_weights=word)  # not a word
        assert not theirs.base_model.model.layer.lora_embedding_A["default"].any()
    with pytest.raises(TypeError, match="loftq_init"):
        with_peft(base, init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    pissa = with_rankwise(base, init=rw.PiSSA())
    assert updates_of(pissa)["layer"].lora_A.any()
    rw.detach(base)
    with pytest.raises(UserError, match="Orthogonal is not defined for an embedding"):
        with_rankwise(base, init=rw.Orthogonal())
    assert type(base.layer) is nn.Embedding


@pytest.mark.parametrize(
    "geometry",
    [{"padding": "same", "dilation": 2}, {"padding": 1, "padding_mode": "reflect"}],
    ids=["dilation", "padding_mode"],
)
def test_15_a_convolution_is_the_same_merged_and_unmerged(geometry: dict[str, Any]):
    base = One(nn.Conv2d(4, 6, 3, **geometry)).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    theirs, ours = with_peft(base), with_rankwise(base)
    shuffle(theirs)
    copy_over(theirs, ours)
    before, mine = theirs(x), ours(x)
    theirs.merge_adapter()
    rw.merge(ours, probe=x)
    assert relative(theirs(x), before) > 0.1  # its A forgets how the layer pads and dilates
    assert relative(ours(x), mine) < 1e-13
    assert relative(theirs(x), mine) < 1e-13  # of its two functions the merged one is right
