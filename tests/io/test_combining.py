"""Combined folders: PEFT and Rankwise load them, and compute the base with Σ w_i δ_i in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise as rw
from foreign import load, outputs, peft_folder, peft_outputs
from rankwise.errors import ArtifactError, UserError
from rankwise.inits import PiSSA
from rankwise.io.combining import combine_folders
from rankwise.io.peft import WEIGHTS
from rankwise.io.peft_alone import read_peft_alone, write_peft_alone
from rankwise.io.portable import Kernel, Portable, assemble
from rankwise.lowrank import Factors
from rankwise.methods.combining import SVD, TIES


def with_sum(base: Path, folders: Sequence[Path], weights: Sequence[float]) -> Any:
    """The base model whose own weights have got Σ w_i s_i B_i A_i, read from PEFT's files."""
    model = load(base).double()
    weight_of = dict(model.named_parameters())
    for folder, weight in zip(folders, weights, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / WEIGHTS)
        for key in (k for k in tensors if k.endswith("lora_A.weight")):
            a, b = (tensors[key.replace("lora_A", f"lora_{side}")].double() for side in "AB")
            r = a.shape[0]
            scale = config["lora_alpha"] / (r**0.5 if config["use_rslora"] else r)
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            with torch.no_grad():
                weight_of[name] += weight * scale * (b @ a)
    return model


@pytest.fixture
def two(llama: Path, tmp_path: Path) -> list[Path]:
    """Two adapters of PEFT on one base, of other ranks, scales and layers."""
    folders = [tmp_path / "one", tmp_path / "two"]
    peft_folder(llama, folders[0], r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    config = {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"}
    peft_folder(llama, folders[1], **config)
    return folders


def test_peft_and_rankwise_compute_the_weighted_sum(
    llama: Path, two: list[Path], tmp_path: Path
) -> None:
    weights = (0.5, -1.25)
    made = combine_folders(two, tmp_path / "out", weights)
    wanted = outputs(with_sum(llama, two, weights))
    assert (wanted - outputs(load(llama))).abs().max() > 1e-2
    torch.testing.assert_close(peft_outputs(llama, tmp_path / "out"), wanted, atol=1e-6, rtol=0)
    model = load(llama)
    rw.load_adapter(model, tmp_path / "out")
    torch.testing.assert_close(outputs(model), wanted, atol=1e-6, rtol=0)
    assert made.combined.error < 1e-7
    ranks = {name.rpartition(".")[2]: f.r for name, f in made.combined.adapter.factors.items()}
    assert ranks["q_proj"] == 6
    assert ranks["gate_proj"] == 2


def test_what_is_written_has_the_error_that_is_told(two: list[Path], tmp_path: Path) -> None:
    exact = combine_folders(two, tmp_path / "exact")
    made = combine_folders(two, tmp_path / "short", how=SVD(r=1))
    wanted, found = (
        {n: f.delta().double() for n, f in read_peft_alone(tmp_path / name).factors.items()}
        for name in ("exact", "short")
    )
    assert made.combined.errors.keys() == exact.combined.errors.keys() == wanted.keys()
    for name, error in made.combined.errors.items():
        lost = (wanted[name] - found[name]).norm() / wanted[name].norm()
        assert error == pytest.approx(lost.item(), rel=1e-4)
    assert 0.1 < made.combined.error < 1


def test_a_start_is_part_of_the_update(llama: Path, two: list[Path], tmp_path: Path) -> None:
    model = load(llama)
    rw.attach(model, rw.LoRA(r=2, target_modules=["q_proj"], init=PiSSA()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    rw.save_adapter(model, tmp_path / "start")
    alone = outputs(model)
    combine_folders([tmp_path / "start"], tmp_path / "out")
    torch.testing.assert_close(peft_outputs(llama, tmp_path / "out"), alone, atol=1e-5, rtol=0)
    both = combine_folders([tmp_path / "start", two[0]], tmp_path / "both", how=TIES(0.4))
    assert 0 < both.combined.error < 1
    rw.load_adapter(load(llama), tmp_path / "both")


def test_the_head_is_that_of_the_adapter_that_is_named(bert: Path, tmp_path: Path) -> None:
    kind = "AutoModelForSequenceClassification"
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        peft_folder(bert, folder, kind, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(UserError) as caught:
        combine_folders(folders, tmp_path / "out")
    assert f"'classifier' was trained whole in '{folders[0]}' and in '{folders[1]}'" in str(
        caught.value
    )
    assert not (tmp_path / "out").exists()
    combine_folders(folders, tmp_path / "out", head=folders[1])
    written, kept = load_file(tmp_path / "out" / WEIGHTS), load_file(folders[1] / WEIGHTS)
    heads = [k for k in kept if "classifier" in k]
    assert len(heads) == 2
    assert all(torch.equal(written[k], kept[k]) for k in heads)
    peft_outputs(bert, tmp_path / "out", kind)
    with pytest.raises(UserError, match="head names the adapter whose modules are kept, one of"):
        combine_folders(folders, tmp_path / "again", head=tmp_path)


# --- small adapters by hand ----------------------------------------------------------------------


def update(out: int = 6, inside: int = 5, r: int = 2) -> Factors:
    return Factors(torch.randn(r, inside), torch.randn(out, r), 1.0)


def folder_of(place: Path, factors: dict[str, Factors], **more: Any) -> Path:
    biases: dict[str, Tensor] | None = more.pop("biases", None)
    portable = Portable(assemble(factors, biases=biases))
    write_peft_alone(replace(portable, **more), place)
    return place


def test_changes_of_biases_add_up(tmp_path: Path) -> None:
    changes = [torch.randn(6), torch.randn(6)]
    folders = [
        folder_of(tmp_path / str(i), {"fc": update()}, biases={"fc.bias": change})
        for i, change in enumerate(changes)
    ]
    combine_folders(folders, tmp_path / "out", (1.0, 0.5))
    found = read_peft_alone(tmp_path / "out").adapter.biases["fc.bias"]
    torch.testing.assert_close(found, changes[0] + 0.5 * changes[1])


def test_convolutions_and_embeddings_stay_what_they_are(tmp_path: Path) -> None:
    kernel = Kernel((2, 3, 3))
    own = {"kernels": {"conv": kernel}, "embeddings": frozenset({"words"})}
    factors = [{"conv": update(4, 18), "words": update(8, 30)} for _ in range(2)]
    folders = [folder_of(tmp_path / str(i), f, **own) for i, f in enumerate(factors)]
    combine_folders(folders, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert tensors["base_model.model.conv.lora_A.weight"].shape == (4, 2, 3, 3)
    assert tensors["base_model.model.words.lora_embedding_A"].shape == (4, 30)
    read = read_peft_alone(tmp_path / "out")
    for name in ("conv", "words"):
        wanted = sum((f[name].delta() for f in factors), torch.zeros(()))
        torch.testing.assert_close(read.factors[name].delta(), wanted)


def test_layers_of_other_kinds_are_of_other_bases(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "one", {"a": update(), "b": update(4, 18)})
    other = folder_of(
        tmp_path / "other",
        {"a": update(), "b": update(4, 18)},
        embeddings=frozenset({"a"}),
        kernels={"b": Kernel((2, 3, 3))},
    )
    with pytest.raises(ArtifactError, match="The adapters are not of one base") as caught:
        combine_folders([one, other], tmp_path / "out")
    assert f"'a' is a linear layer in '{one}' and an embedding in '{other}'" in str(caught.value)
    assert "'b' is a linear layer" in str(caught.value)
    assert "a convolution of 2 x 3 x 3" in str(caught.value)


def saved(place: Path, base: nn.Module, target: str) -> Path:
    rw.attach(base, rw.LoRA(r=2, target_modules=[target], head="freeze"))
    rw.save_adapter(base, place, base_model_name=f"base of {place.name}")
    rw.detach(base)
    return place


def test_adapters_of_other_weights_are_told_by_their_sketches(tmp_path: Path) -> None:
    base, other = nn.ModuleDict({"fc": nn.Linear(9, 9)}), nn.ModuleDict({"fc": nn.Linear(9, 9)})
    one = saved(tmp_path / "one", base, "fc")
    two = saved(tmp_path / "two", other, "fc")
    with pytest.raises(
        ArtifactError, match=r"was made on other weights: 'fc' has a sampled norm of .* in"
    ):
        combine_folders([one, two], tmp_path / "out")
    lowered = saved(tmp_path / "lowered", base.to(torch.bfloat16), "fc")
    combine_folders([one, lowered], tmp_path / "out")


def test_the_sketch_of_all_layers_goes_into_the_result(tmp_path: Path) -> None:
    base = nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Linear(9, 9), "head": nn.Linear(9, 2)})
    folders = [saved(tmp_path / name, base, name) for name in "ab"]
    made = combine_folders(folders, tmp_path / "out")
    assert "base: the files call it base of a, base of b; the first is written" in made.notes
    rw.load_adapter(base, tmp_path / "out")
    rw.detach(base)
    with torch.no_grad():
        base["b"].weight.zero_()  # type: ignore[operator, union-attr]
    with pytest.raises(ArtifactError, match=r"it was made on another base .*the weight of 'b'"):
        rw.load_adapter(base, tmp_path / "out")


# --- refusals ------------------------------------------------------------------------------------


def test_an_output_that_holds_a_source_is_refused(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "one", {"a": update()})
    before = (one / WEIGHTS).read_bytes()
    for out in (one, tmp_path):
        with pytest.raises(UserError, match="holds an adapter that is read"):
            combine_folders([one, one], out)
    assert (one / WEIGHTS).read_bytes() == before


def test_any_format_is_read_and_the_result_is_peft_s(tmp_path: Path) -> None:
    from rankwise.io.convert import Wishes, convert
    from rankwise.io.loralib import Unsaid

    A, B = torch.randn(3, 6), torch.randn(5, 3)
    write_peft_alone(Portable(assemble({"body.q": Factors(A, B, 2.0)})), tmp_path / "peft")
    for form in ("loralib", "mlx", "diffusers"):
        component = Wishes(component="transformer") if form == "diffusers" else None
        convert(tmp_path / "peft", form, tmp_path / form, component)
    wishes = Wishes(unsaid=Unsaid(alpha=6.0), allow_pickle=True)
    folders = [tmp_path / form for form in ("peft", "loralib", "mlx", "diffusers")]
    combine_folders(folders, tmp_path / "out", [1, 10, 100, 1000], wishes=wishes)
    delta = read_peft_alone(tmp_path / "out").factors["body.q"].delta()
    torch.testing.assert_close(delta, 1111 * 2.0 * (B @ A), rtol=1e-5, atol=1e-3)


def test_adapters_of_two_models_of_a_pipeline_are_not_of_one_base(tmp_path: Path) -> None:
    from rankwise.io.convert import Wishes, convert

    write_peft_alone(Portable(assemble({"q": update()})), tmp_path / "peft")
    folders = [tmp_path / name for name in ("unet", "text_encoder")]
    for folder in folders:
        convert(tmp_path / "peft", "diffusers", folder, Wishes(component=folder.name))
    with pytest.raises(ArtifactError, match=r"different models of a pipeline: .*'unet'"):
        combine_folders(folders, tmp_path / "out")


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        combine_folders([tmp_path / "nowhere"], tmp_path / "out")
