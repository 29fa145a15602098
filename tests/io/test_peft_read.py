"""The adapter of a file: what its notes, its configuration and its tensors must agree on."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from peft_models import Heads, gpt2, logits, lora, make, randomise, tied
from rankwise.errors import ArtifactError
from rankwise.inits import PiSSA
from rankwise.io.adapters import load_adapter, save_adapter

QKV = {"c_attn": rw.Split(("q_proj", "k_proj", "v_proj"))}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(build: Callable[[], nn.Module], method: rw.LoRA, folder: Path) -> Path:
    rw.attach(model := make(build), method)
    randomise(model)
    return save_adapter(model, folder / "a")


def rewrite(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    notes: Callable[[dict], object] | None = None,
    **config: object,
) -> Path:
    """Change the tensors, our notes or the configuration of a folder."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    layout = json.loads(metadata.get("rankwise.layout", '{"version":1}'))
    if notes is not None:
        notes(layout)
    metadata["rankwise.layout"] = json.dumps(layout)
    content = load_file(path)
    save_file(content if tensors is None else tensors(content), path, metadata)
    whole = {**json.loads((folder / CONFIG).read_text("utf-8")), **config}
    (folder / CONFIG).write_text(json.dumps(whole), "utf-8")
    return folder


def refused(build: Callable[[], nn.Module], folder: Path, message: str) -> None:
    model = make(build)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ArtifactError, match=message):
        load_adapter(model, folder)
    assert [type(m) for m in model.modules()] == before


def test_a_scale_that_was_changed_beside_the_notes_is_refused(tmp_path: Path):
    folder = saved(gpt2, lora("c_attn.q_proj", split=QKV), tmp_path)
    rewrite(folder, lora_alpha=1.0)
    refused(
        gpt2, folder, "gives the update of '.*c_attn' the scale 0.33.*, and rankwise.layout 1.66"
    )


def test_rows_that_the_update_does_not_have_are_refused(tmp_path: Path):
    folder = saved(gpt2, lora("c_attn.q_proj", split=QKV), tmp_path)

    def stretch(layout: dict) -> None:
        layout["shares"] = {n: [3, 5.0, 3, 6, 0] for n in layout["shares"]}

    rewrite(folder, notes=stretch)
    refused(gpt2, folder, r"more rows than the update of '.*c_attn' has \(3\)")


def test_notes_about_what_is_not_there_are_refused(tmp_path: Path):
    folder = saved(gpt2, lora("c_fc", init=PiSSA()), tmp_path)
    rewrite(folder, notes=lambda layout: layout.update(own=["transformer.nowhere"]))
    refused(gpt2, folder, "the model has no 'transformer.nowhere', which was adapted")
    rewrite(folder, notes=lambda layout: layout.update(own=[], tied={"lm_head": "transformer.h"}))
    refused(gpt2, folder, "'transformer.h' cannot be adapted")


def test_options_that_do_not_go_together_are_refused(tmp_path: Path):
    folder = saved(gpt2, lora("c_fc"), tmp_path)
    rewrite(folder, notes=lambda layout: layout.update(slot=1))
    refused(gpt2, folder, "Its options do not go together: LoRA: slot=1 has no room for rank 3")


def test_tied_layers_with_unlike_updates_are_refused(tmp_path: Path):
    folder = saved(tied, lora("embed_tokens", tied=True), tmp_path)
    rewrite(
        folder,
        lambda tensors: {k: t + 1 if "lm_head.lora_A" in k else t for k, t in tensors.items()},
    )
    refused(tied, folder, "'lm_head' and 'model.embed_tokens' are tied, and the file has another")


def test_a_tie_that_is_broken_here_is_another_base(tmp_path: Path):
    folder = saved(tied, lora("embed_tokens", tied=True), tmp_path)
    model = make(tied)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ArtifactError, match=r"'model\.embed_tokens' shared its weight and its"):
        load_adapter(model, folder)


def test_an_exact_value_that_belongs_to_nothing_is_refused(tmp_path: Path):
    folder = saved(gpt2, lora("c_fc"), tmp_path)
    rewrite(folder, lambda tensors: {**tensors, "rankwise.exact.B.nowhere": torch.ones(1)})
    refused(gpt2, folder, "'rankwise.exact.B.nowhere' belongs to nothing here")


def all_linear(folder: Path, train: bool) -> Path:
    """PEFT adapts the output projection of an attention by itself, and never applies that."""
    config = peft.LoraConfig(r=2, target_modules=["out_proj", "head"])
    model = peft.get_peft_model(make(Heads), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (train or "head" in name):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def test_an_update_that_peft_never_applies_is_refused_unless_it_is_zero(tmp_path: Path):
    load_adapter(make(Heads), all_linear(tmp_path, train=False))
    refused(
        Heads,
        all_linear(tmp_path, train=True),
        "'first.out_proj' is the output projection of an nn.MultiheadAttention, and PEFT never",
    )


def test_a_dense_update_of_groups_is_refused(tmp_path: Path):
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    with pytest.warns(UserWarning, match="groups > 1. Merging is not supported"):
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["conv"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ArtifactError, match="dense over the channels of a convolution with 2 groups"
    ):
        load_adapter(nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)}), tmp_path)


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
@pytest.mark.filterwarnings("ignore:Adapter .default.. 2 LoRA tensor")
def test_a_bias_of_b_that_peft_never_applies_is_refused(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=["first"], lora_bias=True)
    theirs = peft.get_peft_model(make(Heads), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "first.lora_B.default.bias" not in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    load_adapter(model := make(Heads), tmp_path)
    assert (logits(model) - logits(theirs)).abs().max() < 1e-5
    rewrite(tmp_path, lambda t: {k: v + 1 if "first.lora_B.bias" in k else v for k, v in t.items()})
    refused(Heads, tmp_path, "lora_B of 'first' has a bias, and PEFT never applies it")
