import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from rankwise.attaching import attach, lora_layers
from rankwise.errors import EnvironmentFault, RankwiseError, UserError
from rankwise.io.adapters import load_adapter, save_adapter
from rankwise.train.config import FitConfig, make_config
from rankwise.train.config_file import read_config
from rankwise.train.folder import claim
from rankwise.train.model import load_base
from rankwise.train.run import fit
from rankwise.train.setup import make_method

Options = Callable[..., FitConfig]
Finished = Callable[[str], Path]

PARTS = {
    "adapter", "answers.safetensors", "checkpoints", "config.yaml", "last", "manifest.json",
    "metrics.jsonl", "run.lock",
}  # fmt: skip
KINDS = ("single", "pair", "scores", "gpt2", "prompts", "llama", "tied", "head", "full")


# -- what a run leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_is_complete(finished: Finished, look: Any, kind: str) -> None:
    run = finished(kind)
    assert {p.name for p in run.iterdir()} == PARTS
    manifest = look.manifest(run)
    assert manifest["status"] == "finished"
    best = max if manifest["metric"] in ("accuracy", "pearson") else min
    evals = [r for r in look.log(run) if r["event"] == "eval"]
    wanted = best(r[manifest["metric"]] for r in evals)
    assert manifest["metrics"][manifest["metric"]] == wanted
    assert manifest["counts"]["adapter"] == (manifest["counts"]["adapter_formula"] or 0)
    assert read_config(str(run / "config.yaml")) == manifest["config"]


@pytest.mark.parametrize("kind", ["single", "llama", "tied", "head", "full"])
def test_the_adapter_on_disk_gives_the_metrics_of_the_manifest(
    finished: Finished, look: Any, kind: str
) -> None:
    from rankwise.train.predict import examples_of_file, predict
    from rankwise.train.restore import restore

    run = finished(kind)
    loaded = restore(run)
    made = predict(loaded, examples_of_file(loaded, str(loaded.config.eval)))
    wanted = look.manifest(run)["metrics"]
    assert made.metrics == pytest.approx(wanted, rel=1e-5)


def test_tasks_and_forms_are_told_from_the_files(finished: Finished, look: Any) -> None:
    told = {k: look.manifest(finished(k)) for k in KINDS}
    assert {k: (m["task"], m["form"], m["metric"]) for k, m in told.items()} == {
        "single": ("classification", "text", "accuracy"),
        "pair": ("classification", "pair", "accuracy"),
        "scores": ("regression", "text", "pearson"),
        "gpt2": ("causal-lm", "text", "perplexity"),
        "prompts": ("causal-lm", "prompt", "perplexity"),
        "llama": ("causal-lm", "messages", "perplexity"),
        "tied": ("causal-lm", "text", "perplexity"),
        "head": ("classification", "text", "accuracy"),
        "full": ("classification", "text", "accuracy"),
    }
    assert told["pair"]["label_names"] == ["other", "same"]
    assert {k: m["name"] for k, m in told.items() if k in ("single", "head", "full")} == {
        "single": "LoRA r=2",
        "head": "head-only",
        "full": "full fine-tuning",
    }


@pytest.mark.parametrize("kind", ["single", "llama", "full"])
def test_the_written_config_repeats_the_run_bit_for_bit(
    finished: Finished, look: Any, tmp_path: Path, kind: str
) -> None:
    run = finished(kind)
    values = read_config(str(run / "config.yaml")) | {"out": str(tmp_path / "again")}
    again = fit(make_config(values, "test")).folder
    for part in ("adapter", "last"):
        one, other = look.tensors(run / part), look.tensors(again / part)
        assert one.keys() == other.keys()
        assert len(one) > 0
        assert all(torch.equal(one[n], other[n]) for n in one)
    assert look.log(run) == look.log(again)


def test_another_seed_is_another_run(options: Options, look: Any, tmp_path: Path) -> None:
    runs = [fit(options(tmp_path / str(s), seed=s, max_steps=2)).folder for s in (0, 1)]
    one, other = (look.tensors(run / "last") for run in runs)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_the_best_is_kept_beside_the_last(options: Options, look: Any, tmp_path: Path) -> None:
    """With a rate that wrecks the model, the last evaluation is not the best one."""
    result = fit(options(tmp_path / "run", epochs=4, lr=1.0, metric="loss"))
    evals = [r for r in look.log(result.folder) if r["event"] == "eval"]
    losses = {r["step"]: r["loss"] for r in evals}
    best = min(losses, key=lambda step: losses[step])
    assert best != max(losses)
    assert result.manifest["best_step"] == best
    best_one, last = (look.tensors(result.folder / p) for p in ("adapter", "last"))
    assert any(not torch.equal(best_one[n], last[n]) for n in last)


# -- what trains ----------------------------------------------------------------------------------


def frozen_bits(model: nn.Module) -> dict[str, str]:
    return {
        n.replace(".base_layer", ""): hashlib.sha256(
            p.detach().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for n, p in model.named_parameters()
        if not p.requires_grad
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "head"])
def test_the_base_keeps_its_bits(
    options: Options, bert: Path, tmp_path: Path, dtype: str, method: str
) -> None:
    config = options(tmp_path / "run", dtype=dtype, method=method, max_steps=3, dropout=0.1)
    result = fit(config)
    base = load_base(str(bert), "classification", ("0", "1")).model
    attach(base, make_method(config, load_base(str(bert), "classification", ("0", "1"))))
    base.requires_grad_(False)
    fresh = frozen_bits(base.to(getattr(torch, dtype)))
    found = frozen_bits(result.model)
    assert len(found) >= 39
    assert found == {n: fresh[n] for n in found}
    trained = {n for n, p in result.model.named_parameters() if p.requires_grad}
    ends = {n.rpartition(".")[2] for n in trained if "lora" in n}
    assert ends == ({"lora_A", "lora_B"} if method == "lora" else set())
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_bfloat16_base_is_on_record_and_can_be_used(
    options: Options, look: Any, tmp_path: Path
) -> None:
    run = fit(options(tmp_path / "run", dtype="bfloat16", max_steps=3)).folder
    assert look.manifest(run)["hardware"]["dtype"] == "bfloat16"
    assert {t.dtype for t in look.tensors(run / "adapter").values()} == {torch.float32}


def test_full_training_does_not_take_bfloat16(options: Options, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype bfloat16 is for a frozen base"):
        fit(options(tmp_path / "run", method="full", dtype="bfloat16"))
    assert list(tmp_path.iterdir()) == []


def test_gpt2_and_llama_classify(
    gpt2: Path, llama: Path, options: Options, tmp_path: Path, look: Any
) -> None:
    """Their tokenizers may name token types, which Llama does not take."""
    for model in (gpt2, llama):
        run = fit(options(tmp_path / model.name, model=str(model), max_steps=2)).folder
        assert look.manifest(run)["status"] == "finished"


# -- what learned nothing -------------------------------------------------------------------------


def test_one_step_is_enough_not_to_be_called_idle(options: Options, tmp_path: Path) -> None:
    """With B at zero, A has no gradient in the first step."""
    assert fit(options(tmp_path / "run", max_steps=1)).manifest["steps"] == 1


def test_layers_that_the_task_does_not_use_are_named(
    roberta: Path, options: Options, tmp_path: Path, look: Any
) -> None:
    """A decoder's cross attention is passed by when there is no encoder."""
    from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

    config = BertConfig.from_pretrained(
        roberta, is_decoder=True, add_cross_attention=True, max_position_embeddings=64
    )
    folder = tmp_path / "decoder"
    BertLMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(roberta).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the good film was old\na bad story of people\n" * 4)
    text = {"data": str(tmp_path / "text.txt"), "eval": str(tmp_path / "text.txt")}
    with pytest.raises(UserError, match=r"crossattention\.self\.query.*--exclude-modules"):
        fit(options(tmp_path / "run", model=str(folder), max_steps=3, **text))
    told = look.manifest(tmp_path / "run")
    assert told["status"] == "failed"
    assert "crossattention" in told["reason"]
    assert told["metrics"]["perplexity"] > 0
    assert all((tmp_path / "run" / part).is_dir() for part in ("adapter", "last"))
    with_exclusion = options(
        tmp_path / "other", model=str(folder), exclude_modules="crossattention", max_steps=3, **text
    )
    assert fit(with_exclusion).manifest["status"] == "finished"
    everything = options(tmp_path / "full", model=str(folder), method="full", max_steps=2, **text)
    assert fit(everything).manifest["status"] == "finished"


# -- mistakes before training ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no/such/model"}, "no model folder"),
        ({"data": "no-such-file.tsv"}, "no-such-file"),
        ({"target_modules": "querry"}, "Did you mean 'query'"),
        ({"metric": "acuracy"}, "Did you mean 'accuracy'"),
        ({"label_column": "lable"}, "Did you mean 'label'"),
        ({"method": "lora", "layers": "7"}, "no block"),
        ({"max_length": 2}, "max_length"),
        ({"modules_to_save": "poolr"}, "Did you mean"),
    ],
)
def test_a_mistake_leaves_no_folder(
    options: Options, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RankwiseError, match=message) as caught:
        fit(options(tmp_path / "run", **change))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(options: Options, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device that the test needs to be missing")
    with pytest.raises(EnvironmentFault, match="--device cuda"):
        fit(options(tmp_path / "run", device="cuda"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "sentence\tlabel\n", "sentence\tlabel\nfilm\t1\nhouse\t1\n"])
def test_data_without_rows_or_with_one_label(options: Options, tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.tsv").write_text(text)
    with pytest.raises(UserError, match=r"rows\.tsv"):
        fit(options(tmp_path / "run", data=str(tmp_path / "rows.tsv"), eval=None))
    assert [p.name for p in tmp_path.iterdir()] == ["rows.tsv"]


def test_an_unknown_label_in_the_evaluation_rows(
    options: Options, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nthe film\t1\nthe house\t2\n")
    with pytest.raises(UserError, match=r"dev\.tsv:3: label 'label' '2' is not one of the known"):
        fit(options(tmp_path / "run", eval=str(tmp_path / "dev.tsv")))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_exists_is_not_written_into(
    options: Options, finished: Finished, tmp_path: Path
) -> None:
    run = finished("single")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with pytest.raises(UserError, match="holds a run already"):
        fit(options(run))
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        fit(options(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_used_and_stays_after_a_mistake(
    options: Options, tmp_path: Path
) -> None:
    with pytest.raises(UserError):
        fit(options(tmp_path, target_modules="querry"))
    assert tmp_path.is_dir()
    assert fit(options(tmp_path, max_steps=1)).manifest["status"] == "finished"


def test_a_place_that_cannot_be_written(options: Options, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written") as caught:
        fit(options(tmp_path / "file" / "run"))
    assert caught.value.exit_code == 4


def test_a_folder_that_another_run_holds(options: Options, tmp_path: Path) -> None:
    with claim(tmp_path / "run"), pytest.raises(UserError, match="Another run"):
        fit(options(tmp_path / "run"))
    assert (tmp_path / "run").is_dir()


def test_a_run_that_came_first_is_not_overwritten(
    options: Options, finished: Finished, tmp_path: Path, rows: Path
) -> None:
    """Another run takes the folder, and finishes, while this one is still reading."""
    target = tmp_path / "run"

    class Rival:
        def note(self, text: str) -> None:
            if not target.exists():
                shutil.copytree(finished("single"), target)

        def start(self, what: str, total: int, done: int = 0) -> None: ...
        def advance(self, done: int, values: Any) -> None: ...
        def finish(self) -> None: ...

    config = options(target, eval=None)  # it notes that rows are held out
    with pytest.raises(UserError, match="holds a run already"):
        fit(config, reporter=Rival())
    assert (target / "adapter").is_dir()
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["status"] == "finished"


# -- the course of a run ------------------------------------------------------------------------


def test_long_rows_are_cut_and_told(options: Options, tmp_path: Path, witness: Any) -> None:
    fit(options(tmp_path / "run", max_length=6, max_steps=1), reporter=witness)
    assert "training:" in witness.text
    assert "longer than 6 tokens" in witness.text


def test_a_failed_run_says_so(options: Options, tmp_path: Path, look: Any) -> None:
    with pytest.raises(UserError, match="not a finite number"):
        fit(options(tmp_path / "run", lr=1e38, max_skipped=2, epochs=3, warmup=0))
    told = look.manifest(tmp_path / "run")
    assert told["status"] == "failed"
    assert "not a finite number" in told["reason"]


def test_a_run_that_any_fault_ended_says_so_and_goes_on(
    options: Options, tmp_path: Path, look: Any
) -> None:
    class Faulty:
        def note(self, text: str) -> None: ...
        def start(self, *_: Any) -> None: ...
        def finish(self) -> None: ...
        def advance(self, done: int, values: Any) -> None:
            if done == 4:
                raise ZeroDivisionError("a fault of nobody's")

    config = options(tmp_path / "run", save_minutes=0)
    with pytest.raises(ZeroDivisionError):
        fit(config, reporter=Faulty())
    told = look.manifest(tmp_path / "run")
    assert (told["status"], told["reason"]) == ("failed", "a fault of nobody's")
    fit(config, resume=True)
    told = look.manifest(tmp_path / "run")
    assert told["status"] == "finished"
    assert "reason" not in told
    alone = fit(config.model_copy(update={"out": str(tmp_path / "alone")})).folder
    one, other = (look.tensors(run / "last") for run in (alone, tmp_path / "run"))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_a_full_disk_is_told(options: Options, tmp_path: Path, look: Any) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    folder = tmp_path / "run"

    class Filling:
        def note(self, text: str) -> None: ...
        def advance(self, *_: Any) -> None: ...
        def finish(self) -> None: ...
        def start(self, *_: Any) -> None:
            (folder / "metrics.jsonl").symlink_to("/dev/full")

    with pytest.raises(EnvironmentFault, match=r"No space left.*Free some space"):
        fit(options(folder), reporter=Filling())
    assert look.manifest(folder)["status"] == "failed"


# -- in Python ------------------------------------------------------------------------------------


def test_a_saved_adapter_goes_on_a_fresh_base(finished: Finished, bert: Path) -> None:
    base = load_base(str(bert), "classification", ("0", "1"))
    load_adapter(base.model, finished("single") / "adapter")
    assert len(lora_layers(base.model)) == 4


def test_the_result_carries_the_model(options: Options, tmp_path: Path, look: Any) -> None:
    result = fit(options(tmp_path / "run", max_steps=2))
    save_adapter(
        result.model, tmp_path / "again", base_model_name=result.manifest["base"]["source"]
    )
    one, other = look.tensors(result.folder / "last"), look.tensors(tmp_path / "again")
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert result.tokenizer("the good film")["input_ids"][0] == 2
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["max_steps"] == 2
