import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.attaching import base as without_updates
from rankwise.errors import RankwiseError, UserError
from rankwise.train.config import FitConfig
from rankwise.train.export import merge_run
from rankwise.train.exported import Onnx, TorchExport
from rankwise.train.model import fingerprint_folder
from rankwise.train.restore import restore
from rankwise.train.run import fit

Finished = Callable[[str], Path]
KINDS = ("single", "pair", "scores", "gpt2", "prompts", "llama", "tied", "head", "full")


def load(folder: Path) -> Any:
    """The folder by transformers alone."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_is_a_plain_model_that_does_what_the_adapter_does(
    finished: Finished, tmp_path: Path, kind: str
) -> None:
    run, out = finished(kind), tmp_path / "merged"
    certificate = merge_run(run, out)
    assert certificate.passed
    told = json.loads((out / "certificate.json").read_text())
    loaded = restore(run, dtype=None)
    ids = torch.arange(4, 20).reshape(2, 8)
    adapted = logits(loaded.base.model, ids)
    merged = load(out)
    error = (logits(merged, ids) - adapted).abs().max().item()
    assert error <= told["outputs"]["tolerance"]
    if kind not in ("head", "full"):
        assert told["layers"]
        with without_updates(loaded.base.model):
            effect = (logits(loaded.base.model, ids) - adapted).abs().max().item()
        assert effect > 100 * error
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    assert told["read_back"] == "equal bit for bit"


def test_the_certificate_names_the_files_it_is_about(
    finished: Finished, bert: Path, tmp_path: Path
) -> None:
    run, out = finished("single"), tmp_path / "merged"
    merge_run(run, out)
    told = json.loads((out / "certificate.json").read_text())["sha256"]

    def digest(file: Path) -> str:
        return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"

    assert told == {
        "base": digest(bert / "model.safetensors"),
        "adapter": digest(run / "adapter" / "adapter_model.safetensors"),
        "merged": digest(out / "model.safetensors"),
    }
    assert told["merged"] == fingerprint_folder(out)


def test_the_folder_brings_its_tokenizer_and_labels(finished: Finished, tmp_path: Path) -> None:
    from transformers import pipeline

    merge_run(finished("pair"), tmp_path / "merged")
    classify = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")
    found: Any = classify({"text": "the good film", "text_pair": "a bad story"})
    assert found["label"] in ("same", "other")


def test_the_probe_is_the_run_s_evaluation_rows_or_a_file_or_fixed_sentences(
    finished: Finished, rows: Path, tmp_path: Path, witness: Any
) -> None:
    def probe(run: Path, name: str, **more: Any) -> str:
        certificate = merge_run(run, tmp_path / name, reporter=witness, **more)
        told = json.loads((tmp_path / name / "certificate.json").read_text())
        assert certificate.probe == told["probe"]
        return json.loads((tmp_path / name / "certificate.json").read_text())["probe"]

    run = finished("single")
    assert probe(run, "own") == f"16 rows of {rows / 'dev.tsv'}"
    named = probe(run, "named", probe=str(rows / "train.tsv"))
    assert named == f"16 rows of {rows / 'train.tsv'}"
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    told = json.loads((moved / "manifest.json").read_text())
    told["config"]["eval"] = str(tmp_path / "gone.tsv")
    (moved / "manifest.json").write_text(json.dumps(told))
    assert witness.notes == []
    assert probe(moved, "fixed") == "8 fixed sentences"
    assert "cannot be read, so the merge is measured on 8 fixed sentences" in witness.text
    assert "gone.tsv" in witness.text


def test_without_an_evaluation_file_the_probe_is_what_was_held_out(
    options: Callable[..., FitConfig], rows: Path, tmp_path: Path
) -> None:
    shutil.copy(rows / "train.tsv", tmp_path / "train.tsv")
    data = {"data": str(tmp_path / "train.tsv"), "eval": None}
    run = fit(options(tmp_path / "run", max_steps=2, eval_fraction=0.25, **data)).folder
    assert merge_run(run, tmp_path / "one").probe == f"12 rows held out of {data['data']}"
    with (tmp_path / "train.tsv").open("a") as stream:
        stream.write("a warm story of the people\t1\n" * 20)
    told = merge_run(run, tmp_path / "two").probe
    assert told.endswith(f"rows of {data['data']}, which has changed since the training")


def test_the_tokenizer_neither_cuts_nor_pads_of_itself(finished: Finished, tmp_path: Path) -> None:
    """To encode the probe it was told to cut at the run's length."""
    merge_run(finished("single"), tmp_path / "merged")
    told = json.loads((tmp_path / "merged" / "tokenizer.json").read_text())
    assert (told["truncation"], told["padding"]) == (None, None)


def test_tied_weights_that_an_update_parts_are_parted_in_the_config(
    finished: Finished, gpt2: Path, tmp_path: Path
) -> None:
    certificate = merge_run(finished("tied"), tmp_path / "parted")
    assert certificate.untied
    merged = load(tmp_path / "parted")
    assert merged.config.tie_word_embeddings is False
    embedding, output = merged.transformer.wte.weight, merged.lm_head.weight
    assert not torch.equal(embedding, output)
    before = load_file(gpt2 / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(output, before)
    merge_run(finished("gpt2"), tmp_path / "tied")
    kept = load(tmp_path / "tied")
    assert kept.config.tie_word_embeddings
    assert kept.transformer.wte.weight is kept.lm_head.weight


def test_a_checkpoint_in_bfloat16_stays_one_unless_asked_for_more(
    half: Callable[[Path], Path], bert: Path, options: Callable[..., FitConfig], tmp_path: Path
) -> None:
    more = {"epochs": 6, "lr": 0.02, "target_modules": "all-linear"}
    run = fit(options(tmp_path / "run", model=str(half(bert)), **more)).folder
    certificate = merge_run(run, tmp_path / "own")
    assert certificate.dtype == "bfloat16"
    merged = load_file(tmp_path / "own" / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    assert merge_run(run, tmp_path / "wide", dtype="float32").dtype == "float32"
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert {t.dtype for t in wide.values()} == {torch.float32}
    # merged in float32 and rounded once: never further off than half a bfloat16 step
    for name, tensor in wide.items():
        if "query.weight" in name:
            assert torch.equal(merged[name], tensor.bfloat16())


def test_the_last_adapter_may_be_merged(options: Callable[..., FitConfig], tmp_path: Path) -> None:
    run = fit(options(tmp_path / "run", epochs=4, lr=1.0, metric="loss")).folder
    for which in ("adapter", "last"):
        merge_run(run, tmp_path / which, which=which)
    assert fingerprint_folder(tmp_path / "adapter") != fingerprint_folder(tmp_path / "last")


# -- further files --------------------------------------------------------------------------------


def shallow(folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> str:
    """A copy of a model folder with the first layer alone: to follow each takes seconds."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    loader = AutoModel if folder.name == "bert" else AutoModelForCausalLM
    loader.from_pretrained(folder, num_hidden_layers=1, dtype=dtype).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return str(out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_is_exported_computes_what_the_folder_computes(
    bert: Path,
    llama: Path,
    rows: Path,
    options: Callable[..., FitConfig],
    tmp_path: Path,
    witness: Any,
    kind: str,
) -> None:
    """Text by the folder's own tokenizer, run by onnxruntime, torch.export and transformers."""
    import onnxruntime
    from transformers import AutoTokenizer

    model, form = {"bert": (bert, ".tsv"), "llama": (llama, "-chats.jsonl")}[kind]
    more = {"data": str(rows / f"train{form}"), "eval": str(rows / f"dev{form}"), "lr": 0.01}
    run = fit(options(tmp_path / "run", model=shallow(model, tmp_path / "base"), **more)).folder
    out = tmp_path / "merged"
    merge_run(run, out, exports=[Onnx(), TorchExport()], reporter=witness)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    program = torch.export.load(out / "model.pt2").module()
    plain = load(out)
    wanted = {entry.name for entry in session.get_inputs()}
    assert {"input_ids", "attention_mask"} <= wanted
    for texts in (["a good story"], ["the film", "one dull old house and its people", "bad"]):
        batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
        batch = {name: tensor for name, tensor in batch.items() if name in wanted}
        with torch.no_grad():
            expected = plain(**batch).logits
            followed = program(**batch)["logits"]
        (found,) = session.run(["logits"], {n: t.numpy() for n, t in batch.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(followed, expected, rtol=1e-4, atol=1e-4)
    told = json.loads((out / "certificate.json").read_text())["exports"]
    assert [(e["format"], e["outputs"]) for e in told] == [
        ("onnx", ["logits"]),
        ("torch-export", ["logits"]),
    ]
    for entry, file in zip(told, ("model.onnx", "model.pt2"), strict=True):
        digest = hashlib.sha256((out / file).read_bytes()).hexdigest()
        assert entry["sha256"] == {file: f"sha256:{digest}"}
        assert all(check["error"] <= check["tolerance"] for check in entry["checks"])
        assert [check["shapes"]["input_ids"][0] for check in entry["checks"]] == [16, 1]
    assert "model.onnx (onnx): run on inputs of 2 shape(s), error " in witness.text
    assert "model.pt2 (torch-export): run on inputs of 2 shape(s), error " in witness.text


@pytest.mark.slow
def test_an_export_that_fails_leaves_no_merged_folder(
    bert: Path, options: Callable[..., FitConfig], tmp_path: Path
) -> None:
    half = shallow(bert, tmp_path / "half", torch.bfloat16)
    run = fit(options(tmp_path / "run", model=half, method="head", max_steps=1)).folder
    error = refused(run, tmp_path / "merged", exports=[Onnx()])
    assert error.exit_code == 3
    assert "--dtype float32" in str(error)
    assert not (tmp_path / "merged").exists()


def test_a_missing_package_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = refused(tmp_path / "no run", tmp_path / "merged", exports=[Onnx()])
    assert error.exit_code == 4
    assert 'pip install "rankwise[onnx]"' in str(error)


# -- what is refused ------------------------------------------------------------------------------


def refused(run: Path, out: Path, **more: Any) -> RankwiseError:
    with pytest.raises(RankwiseError) as caught:
        merge_run(run, out, **more)
    return caught.value


def test_a_folder_that_holds_something_is_not_written_over(
    finished: Finished, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    error = refused(finished("single"), tmp_path / "full")
    assert isinstance(error, UserError)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert "not empty" in str(refused(finished("single"), tmp_path / "full" / "notes.txt"))
    merge_run(finished("single"), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.fixture
def sabotaged(finished: Finished, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a run whose adapter tensors are changed by a function."""

    def make(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
        run = tmp_path / "sabotaged"
        shutil.copytree(finished("single"), run)
        file = run / "adapter" / "adapter_model.safetensors"
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = {n: change(n, t).contiguous() for n, t in load_file(file).items()}
        save_file(tensors, file, metadata)
        return run

    return make


def test_an_adapter_that_is_not_finite_is_not_merged(
    sabotaged: Callable[..., Path], tmp_path: Path
) -> None:
    run = sabotaged(lambda name, t: t * torch.nan if "0.attention.self.query.lora_B" in name else t)
    error = refused(run, tmp_path / "merged")
    assert error.exit_code == 3
    assert "query" in str(error)
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_rounding_swallows_is_not_written(
    sabotaged: Callable[..., Path], tmp_path: Path
) -> None:
    """An update far below bfloat16's resolution would be lost, and the certificate says so."""
    run = sabotaged(lambda name, t: t * 1e-3 if "lora_B" in name else t)
    error = refused(run, tmp_path / "merged", dtype="bfloat16")
    assert "certificate FAILED" in str(error)
    assert error.exit_code == 3
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"sabotaged"}


def test_a_probe_that_is_no_such_file(finished: Finished, tmp_path: Path) -> None:
    error = refused(finished("single"), tmp_path / "merged", probe=str(tmp_path / "none.tsv"))
    assert error.exit_code == 2
    assert not (tmp_path / "merged").exists()
