"""From format to format: the same function at the end, each decision told, the rest refused."""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from foreign import load, our_outputs, outputs, peft_folder, peft_outputs
from rankwise.errors import ArtifactError, UserError
from rankwise.io.convert import Wishes, convert, read_any
from rankwise.io.holding import FORMATS, READERS
from rankwise.io.loralib import Unsaid

MIXED: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "up_proj"],
    "rank_pattern": {"k_proj": 2},
    "alpha_pattern": {"up_proj": 3},
    "use_rslora": True,
}


def wishes(base: Path, **more: Any) -> Wishes:
    told: dict[str, Any] = {"base": base, "allow_pickle": True, "unsaid": Unsaid(alpha=4)}
    return Wishes(**(told | more))


@pytest.fixture(scope="module")
def every(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """One adapter with every kind of scale in each format, and what it computes."""
    folder = tmp_path_factory.mktemp("every")
    want, plain = peft_folder(llama, folder / "peft", **MIXED)
    assert (want - plain).abs().max() > 1e-2
    for to in list(FORMATS)[1:]:
        convert(folder / "peft", to, folder / to, wishes(llama, component="unet"))
    return folder, want


@pytest.mark.parametrize("source", FORMATS)
def test_each_format_is_read_to_the_same_function(
    every: tuple[Path, torch.Tensor], llama: Path, source: str
):
    from rankwise.io.blueprint import blueprint

    folder, want = every
    portable = read_any(folder / source, wishes(llama), blueprint(llama))
    assert (our_outputs(llama, portable) - want).abs().max() < 1e-6
    assert portable.notes[0].endswith(f"({source})")


@pytest.mark.parametrize(("source", "to"), [*permutations(FORMATS, 2), *((f, f) for f in FORMATS)])
def test_each_format_becomes_each_other(
    every: tuple[Path, torch.Tensor], llama: Path, source: str, to: str, tmp_path: Path
):
    folder, want = every
    told = wishes(llama, component="unet")
    convert(folder / source, to, tmp_path / "a", told)
    convert(tmp_path / "a", "peft", tmp_path / "b", told)
    assert (peft_outputs(llama, tmp_path / "b") - want).abs().max() < 1e-6


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_that_knows_no_patterns_computes_the_same(
    every: tuple[Path, torch.Tensor], llama: Path, reader: str, tmp_path: Path
):
    folder, want = every
    notes = convert(folder / "peft", "peft", tmp_path / "a", Wishes(reader=reader))
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for key in READERS[reader].ignores:
        assert not said[key]
        said.pop(key)
    assert (said["r"], said["lora_alpha"]) == (4, 4)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said))
    assert (peft_outputs(llama, tmp_path / "a") - want).abs().max() < 1e-6
    assert any(note.startswith("fold: ") for note in notes)
    assert any(note.startswith("pad: 2 updates") for note in notes)


@pytest.mark.parametrize("reader", READERS)
def test_nothing_is_folded_where_nothing_would_be_misread(reader: str, llama: Path, tmp_path: Path):
    peft_folder(llama, tmp_path / "a", r=2, lora_alpha=8, target_modules=["q_proj"])
    notes = convert(tmp_path / "a", "peft", tmp_path / "b", Wishes(reader=reader))
    assert f"scale: right for {READERS[reader].name} as it is, nothing was folded" in notes
    one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_vllm_is_told_of_ranks_above_its_limit(llama: Path, tmp_path: Path):
    peft_folder(llama, tmp_path / "a", r=24, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"rank 24, and vLLM takes 16.*--max-lora-rank 24"):
        convert(tmp_path / "a", "peft", tmp_path / "b", Wishes(reader="vllm"))
    assert not (tmp_path / "b").exists()
    convert(tmp_path / "a", "peft", tmp_path / "b", Wishes(reader="vllm", max_rank=32))
    convert(tmp_path / "a", "peft", tmp_path / "c", Wishes(reader="sglang"))


def test_a_head_is_for_vllm_alone(bert: Path, tmp_path: Path):
    config = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    peft_folder(bert, tmp_path / "a", "AutoModelForSequenceClassification", **config)
    notes = convert(tmp_path / "a", "peft", tmp_path / "b", Wishes(reader="vllm"))
    assert "vLLM takes classifier and score in its newest versions" in " ".join(notes)
    for reader in ("sglang", "llama.cpp", "tgi"):
        with pytest.raises(UserError, match=r"modules that trained whole \('classifier'\)"):
            convert(tmp_path / "a", "peft", tmp_path / "c", Wishes(reader=reader))
    assert not (tmp_path / "c").exists()


def test_parts_of_gpt2_become_what_peft_reads(gpt2: Path, tmp_path: Path):
    torch.manual_seed(1)
    state = {
        "transformer.h.1.attn.c_attn.lora_A": torch.randn(4, 32),
        "transformer.h.1.attn.c_attn.lora_B": torch.randn(64, 2) / 10,
    }
    torch.save(state, tmp_path / "lora.pt")
    unsaid = Unsaid(alpha=8, enable_lora={"c_attn": (True, False, True)})
    told = Wishes(unsaid=unsaid, allow_pickle=True, base=gpt2)
    notes = convert(tmp_path / "lora.pt", "peft", tmp_path / "a", told)
    assert any(
        "2 updates of parts become 1 updates of whole projections of rank 4" in n for n in notes
    )
    want = our_outputs(gpt2, read_any(tmp_path / "lora.pt", told))
    assert (peft_outputs(gpt2, tmp_path / "a") - want).abs().max() < 1e-6
    convert(tmp_path / "lora.pt", "loralib", tmp_path / "b", told)
    back = torch.load(tmp_path / "b" / "lora.pt", weights_only=True)
    assert all(torch.equal(back[k], t) for k, t in state.items())


def test_the_report_tells_each_decision(
    every: tuple[Path, torch.Tensor], llama: Path, tmp_path: Path
):
    notes = convert(every[0] / "peft", "mlx", tmp_path / "a", Wishes(base=llama))
    assert [note.partition(":")[0].split()[0] for note in notes] == [
        "read",
        "fold",
        "pad",
        "keys",
        "scale",
        "wrote",
    ]
    assert notes[0].startswith("read 6 updates of rank 2 to 4, scale 1.5 to 5.65685, from ")
    assert notes[-1].endswith("adapters.safetensors' (mlx)")


@pytest.mark.parametrize(
    ("to", "more", "told"),
    [
        ("pefd", {}, r"to \(--to\) must be one of peft, .*Did you mean 'peft'"),
        ("peft", {"reader": "vlm"}, r"for \(--for\) must be one of vllm.*Did you mean 'vllm'"),
        ("peft", {"source": "loralip"}, r"from \(--from\) must be one of.*Did you mean 'loralib'"),
        ("gguf", {"reader": "vllm"}, "vLLM reads PEFT's files, so --for vllm goes with --to peft"),
        ("gguf", {}, "Give the base or its config.json: --base"),
        ("kohya", {}, "nothing was said. Give component"),
        ("peft", {"source": "gguf"}, "is no file, and an adapter of gguf is one"),
        ("peft", {"base": "nowhere"}, "There is no 'nowhere'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    every: tuple[Path, torch.Tensor], to: str, more: dict[str, Any], told: str, tmp_path: Path
):
    with pytest.raises(UserError, match=told):
        convert(every[0] / "peft", to, tmp_path / "a", Wishes(**more))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_if_it_holds_an_adapter(
    every: tuple[Path, torch.Tensor], llama: Path, tmp_path: Path
):
    source = every[0] / "peft"
    out = tmp_path / "a"
    out.mkdir()
    convert(source, "peft", out)
    convert(source, "gguf", out, wishes(llama))
    assert [p.name for p in out.iterdir()] == ["adapter.gguf"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files.*'notes\.txt'"):
        convert(source, "peft", out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is a file; name a folder"):
        convert(source, "peft", out / "notes.txt")


def test_the_source_is_never_replaced(
    every: tuple[Path, torch.Tensor], llama: Path, tmp_path: Path
):
    shutil.copytree(every[0] / "kohya", tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a" / "lora.safetensors"):
        with pytest.raises(UserError, match="holds an adapter that is read"):
            convert(path, "peft", tmp_path / "a", wishes(llama))
    assert (tmp_path / "a" / "lora.safetensors").exists()


def test_damage_is_refused_and_nothing_is_written(every: tuple[Path, torch.Tensor], tmp_path: Path):
    shutil.copytree(every[0] / "peft", tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="the file was cut off"):
        convert(tmp_path / "a", "mlx", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("source", FORMATS)
def test_numbers_that_are_not_finite_do_not_pass(
    every: tuple[Path, torch.Tensor], llama: Path, source: str, tmp_path: Path
):
    folder = tmp_path / "a"
    shutil.copytree(every[0] / source, folder)
    (file,) = (p for p in folder.iterdir() if p.suffix in (".safetensors", ".pt", ".gguf"))
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        next(t for t in tensors.values() if t.ndim)[0] = torch.nan
        save_file(tensors, file)
    elif file.suffix == ".pt":
        state = torch.load(file, weights_only=True)
        next(iter(state.values()))[0] = torch.nan
        torch.save(state, file)
    else:
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\xc0\x7f")
    with pytest.raises(ArtifactError, match="not finite"):
        read_any(folder, wishes(llama))


def ours(base: Path, folder: Path, method: Any) -> torch.Tensor:
    """Save what Rankwise trained with this method; gives what it computes."""
    import rankwise

    model = load(base)
    rankwise.attach(model, method)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point() and "updates" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    rankwise.save_adapter(model, folder)
    assert (outputs(model) - outputs(load(base))).abs().max() > 1e-2
    return outputs(model)


@pytest.mark.parametrize("to", [f for f in FORMATS if f != "loralib"])
def test_a_start_that_rankwise_trained_from_is_an_exact_pair(llama: Path, to: str, tmp_path: Path):
    import rankwise
    from rankwise.inits import PiSSA

    method = rankwise.LoRA(r=2, alpha=4, target_modules=["q_proj", "up_proj"], init=PiSSA())
    want = ours(llama, tmp_path / "a", method)
    told = wishes(llama, component="unet")
    convert(tmp_path / "a", to, tmp_path / "b", told)
    convert(tmp_path / "b", "peft", tmp_path / "c", told)
    portable = read_any(tmp_path / "c")
    assert {f.pair().r for f in portable.factors.values()} == {4}
    assert (peft_outputs(llama, tmp_path / "c") - want).abs().max() < 1e-6


def test_parts_and_biases_that_rankwise_trained(gpt2: Path, tmp_path: Path):
    import rankwise

    split = {"c_attn": rankwise.Split(("q_proj", "k_proj", "v_proj"))}
    method = rankwise.LoRA(
        r=2,
        target_modules=["c_attn.q_proj", "c_attn.v_proj"],
        split=split,
        alpha_pattern={"c_attn.v_proj": 3},
        bias="adapted",
    )
    want = ours(gpt2, tmp_path / "a", method)
    with pytest.raises(UserError, match="biases are stored as values, and the base"):
        convert(tmp_path / "a", "peft", tmp_path / "b")
    convert(tmp_path / "a", "peft", tmp_path / "b", Wishes(base=gpt2))
    assert (peft_outputs(gpt2, tmp_path / "b") - want).abs().max() < 1e-6
