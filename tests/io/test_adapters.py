"""One door for every method: where it saves, what it replaces, what it finds."""

import shutil
import socket
from pathlib import Path

import pytest
import torch

import rankwise as rw
from rankwise.errors import ArtifactError, UserError
from rankwise.io.adapters import load_adapter, save_adapter


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_saving_and_loading_are_inverse(saved: Path, base, trained, ids, tmp_path: Path):
    load_adapter(model := base(), saved)
    assert torch.equal(model.eval()(ids), trained()(ids))
    again = save_adapter(model, tmp_path / "again")
    assert content(again) == content(saved)
    rw.detach(model)
    assert torch.equal(model(ids), base()(ids))


def test_an_adapter_is_replaced_by_another_of_any_kind(saved: Path, trained, base):
    save_adapter(trained(rw.HeadOnly()), saved)
    assert set(content(saved)) == {"rankwise.json", "trained.safetensors"}
    save_adapter(trained(), saved)
    assert set(content(saved)) == {"adapter_config.json", "adapter_model.safetensors"}
    load_adapter(base(), saved)


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path, trained):
    (tmp_path / "empty").mkdir()
    assert save_adapter(trained(), tmp_path / "empty") == tmp_path / "empty"
    assert save_adapter(trained(), str(tmp_path / "a" / "b" / "c")) == tmp_path / "a" / "b" / "c"


@pytest.mark.parametrize("with_adapter", [True, False])
def test_other_files_are_never_removed(saved: Path, trained, with_adapter: bool):
    (saved / "notes.txt").write_text("mine")
    if not with_adapter:
        (saved / "adapter_config.json").unlink()
    before = content(saved)
    with pytest.raises(UserError, match=r"holds other files \(notes\.txt\)") as found:
        save_adapter(trained(rw.HeadOnly()), saved)
    assert found.value.exit_code == 2
    assert content(saved) == before


def test_a_file_in_the_place_of_the_folder_is_kept(tmp_path: Path, trained):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UserError, match="is a file; name a folder"):
        save_adapter(trained(), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_a_bare_or_merged_model_has_nothing_to_save(tmp_path: Path, base):
    with pytest.raises(UserError, match="carries no adapter"):
        save_adapter(base(), tmp_path / "a")


def test_a_model_carries_one_adapter(saved: Path, trained):
    with pytest.raises(UserError, match="carries an adapter already"):
        load_adapter(trained(), saved)


def test_the_one_adapter_in_a_folder_is_found(saved: Path, base, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "run" / "checkpoint-20")
    (tmp_path / "run" / "logs").mkdir()
    load_adapter(base(), tmp_path / "run")
    shutil.copytree(saved, tmp_path / "run" / "checkpoint-10")
    with pytest.raises(UserError, match=r"several adapters; name one: .*checkpoint-10, .*-20"):
        load_adapter(base(), tmp_path / "run")
    load_adapter(base(), tmp_path / "run" / "checkpoint-10")


def test_a_folder_without_an_adapter_says_what_it_holds(tmp_path: Path, base):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ArtifactError, match=r"holds no adapter.*It holds: model\.safetensors"):
        load_adapter(base(), tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ArtifactError, match="Its weights are there without it"):
        load_adapter(base(), tmp_path)


def test_a_name_of_the_hub_is_not_fetched(saved: Path, base, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UserError, match="fetches nothing: download an adapter of the hub first"):
        load_adapter(base(), "someone/their-adapter")
    load_adapter(base(), saved)


def test_a_file_is_not_a_folder(saved: Path, base):
    with pytest.raises(UserError, match=r"is a file; name the folder it is in"):
        load_adapter(base(), saved / "adapter_model.safetensors")
