import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.attaching import lora_layers
from rankwise.errors import ArtifactError, UserError
from rankwise.train.config import FitConfig
from rankwise.train.restore import restore
from rankwise.train.run import fit

Finished = Callable[[str], Path]
KINDS = ("single", "pair", "scores", "gpt2", "prompts", "llama", "tied", "head", "full")


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_model_is_the_one_that_was_saved(
    finished: Finished, options: Callable[..., FitConfig], tmp_path: Path, look: Any, kind: str
) -> None:
    from rankwise.io.adapters import save_adapter

    run = finished(kind)
    loaded = restore(run)
    assert not loaded.base.model.training
    name = loaded.config.model
    save_adapter(loaded.base.model, tmp_path / "again", base_model_name=name)
    one, other = look.tensors(run / "adapter"), look.tensors(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_the_model_computes_what_the_trained_one_did(
    options: Callable[..., FitConfig], tmp_path: Path
) -> None:
    for method in ("lora", "head", "full"):
        result = fit(options(tmp_path / method, method=method, max_steps=3))
        loaded = restore(result.folder, which="last")
        batch = loaded.base.tokenizer(["the good film", "a bad story"], return_tensors="pt")
        with torch.no_grad():
            wanted = result.model.eval()(**batch).logits
            assert torch.equal(loaded.base.model(**batch).logits, wanted)


def test_the_best_or_the_last(options: Callable[..., FitConfig], tmp_path: Path) -> None:
    run = fit(options(tmp_path / "run", epochs=4, lr=1.0, metric="loss")).folder
    best, last = (lora_layers(restore(run, which=w).base.model) for w in ("adapter", "last"))
    assert any(not torch.equal(best[n].update.lora_B, last[n].update.lora_B) for n in best)


def test_a_base_that_has_moved(finished: Finished, bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "moved")
    loaded = restore(finished("single"), model=str(tmp_path / "moved"))
    assert loaded.base.source == str(tmp_path / "moved")
    assert loaded.config.model == str(bert)


def test_another_base_is_refused(finished: Finished, bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(77)
    BertModel(BertConfig.from_pretrained(bert)).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "other")
    for kind in ("single", "head"):
        with pytest.raises(ArtifactError):
            restore(finished(kind), model=str(tmp_path / "other"))


def test_inputs_are_no_longer_than_in_training(finished: Finished) -> None:
    assert restore(finished("single")).max_length == 64  # the model's own limit
    assert restore(finished("llama")).max_length == 128


def test_folders_that_hold_no_run(tmp_path: Path, finished: Finished) -> None:
    with pytest.raises(UserError, match="no run folder"):
        restore(tmp_path)
    with pytest.raises(UserError, match="no run folder"):
        restore(finished("single") / "adapter")
    with pytest.raises(UserError, match="There is no run folder"):
        restore(tmp_path / "none")


def test_a_run_that_has_saved_nothing_yet(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished("single"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match=r"saved no adapter yet.*--resume"):
        restore(tmp_path / "run")


def test_a_damaged_adapter(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished("single"), tmp_path / "run")
    file = next((tmp_path / "run" / "adapter").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="safetensors"):
        restore(tmp_path / "run")
