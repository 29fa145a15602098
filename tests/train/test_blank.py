"""The model of a config, without weights; a config that names none is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rankwise.errors import UserError
from rankwise.train.blank import blank_model


def test_it_is_the_architectures_own_class_without_weights(gpt2: Path) -> None:
    model = blank_model(str(gpt2))
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("names", [[], ["NoSuchModel"]])
def test_an_unknown_architecture_is_told(bert: Path, tmp_path: Path, names: list[str]) -> None:
    shutil.copytree(bert, tmp_path / "bert")
    config = json.loads((bert / "config.json").read_text())
    config["architectures"] = names
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its layers are not known"):
        blank_model(str(tmp_path / "bert"))
