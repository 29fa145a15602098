"""The bare base of an adapter: a run's own model, or a language model that is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rankwise.attaching import attached
from rankwise.errors import UserError
from rankwise.io.peft_alone_keys import ModelNeeded
from rankwise.train.bare import bare_base

NEEDED = ModelNeeded("Only the model tells.")


def test_a_run_knows_its_model_and_classes(
    finished: Callable[[str], Path], bert: Path, tmp_path: Path
) -> None:
    run = finished("single")
    moved = shutil.copytree(bert, tmp_path / "moved")
    for base in (None, moved):
        model = bare_base(run, base, NEEDED)
        assert type(model).__name__ == "BertForSequenceClassification"
        assert model.get_submodule("classifier").weight.shape == (2, 32)
        assert not attached(model)


def test_a_language_model_that_is_named_keeps_its_format(
    llama: Path, half: Callable[[Path], Path], tmp_path: Path
) -> None:
    for base in (llama, half(llama)):
        found = bare_base(tmp_path, base, NEEDED).state_dict()
        wanted = AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
        assert found.keys() == wanted.keys()
        assert all(
            torch.equal(t, wanted[n]) and t.dtype == wanted[n].dtype for n, t in found.items()
        )


def test_a_model_that_is_not_told_is_asked_for(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Only the model tells\. .*--base MODEL"):
        bare_base(tmp_path, None, NEEDED)
    with pytest.raises(UserError, match=r"^Only the model tells\. .* is no language model"):
        bare_base(tmp_path, bert, NEEDED)
