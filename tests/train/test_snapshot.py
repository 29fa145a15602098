"""Where the files of a model are: a folder as it is, a hub's name only where it can be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rankwise.errors import EnvironmentFault
from rankwise.train.snapshot import local_folder


def test_a_folder_is_itself(bert: Path) -> None:
    assert local_folder(str(bert)) == bert


@pytest.mark.parametrize("name", ["bert-base-uncased", "no such name"])
def test_a_hub_model_that_cannot_be_had_is_a_fault_of_the_machine(name: str) -> None:
    with pytest.raises(EnvironmentFault, match="could not be had from the hub"):
        local_folder(name)


def test_a_model_in_the_cache_needs_no_network(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as huggingface_hub lays it out: a commit named by a reference, and its files."""
    home = tmp_path / "models--someone--small"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    shutil.copytree(bert, home / "snapshots" / "abc")
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_folder("someone/small") == home / "snapshots" / "abc"
