"""Pickles are opened on request, as tensors; what is more than tensors never runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.errors import ArtifactError, EnvironmentFault, UserError
from rankwise.io.pickles import ask_for_pickle, read_pickle, write_pickle

TENSORS = {"a.lora_A": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(2)}


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def test_what_is_written_is_read_and_is_a_plain_state_dict(tmp_path: Path):
    path = write_pickle(tmp_path / "deep" / "x.pt", TENSORS)
    found = read_pickle(path)
    assert list(found) == list(TENSORS)
    assert all(torch.equal(found[k], t) for k, t in TENSORS.items())
    assert torch.load(path, weights_only=True).keys() == TENSORS.keys()


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path):
    row = torch.zeros(100_000, 2)[0]
    assert write_pickle(tmp_path / "x.pt", {"a": row}).stat().st_size < 5_000


def test_a_pickle_is_opened_only_when_asked():
    with pytest.raises(UserError, match=r"'x\.pt' is a pickle.*--allow-pickle"):
        ask_for_pickle("x.pt", allowed=False)
    ask_for_pickle("x.pt", allowed=True)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_malicious_pickle_does_not_run(tmp_path: Path, legacy: bool, nested: bool):
    sentinel = tmp_path / "sentinel"
    content: Any = {"a.lora_A": torch.ones(1), "x": Malicious(sentinel)}
    content = {"model_state_dict": content} if nested else content
    path = tmp_path / "evil.bin"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ArtifactError, match=r"holds more than tensors.*was not opened"):
        read_pickle(path)
    assert not sentinel.exists()
    with pytest.raises(ArtifactError, match="save it as safetensors"):
        read_pickle(path)
    pickle.loads(pickle.dumps(Malicious(sentinel)))
    assert sentinel.exists()


def test_a_bare_malicious_pickle_does_not_run(tmp_path: Path):
    sentinel, path = tmp_path / "sentinel", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Malicious(sentinel)))
    with pytest.raises(ArtifactError):
        read_pickle(path)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", r"begins with b'<htm'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'vers'"),
        (b"PK\x03\x04" + b"\0" * 40, "its archive was cut off"),
        (b"\x80\x02" + b"garbage", "damaged|more than tensors"),
    ],
)
def test_what_is_no_checkpoint_is_said_plainly(tmp_path: Path, content: bytes, told: str):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ArtifactError, match=told):
        read_pickle(tmp_path / "x.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_damaged(tmp_path: Path, share: float):
    whole = write_pickle(tmp_path / "x.pt", TENSORS).read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ArtifactError, match="damaged"):
        read_pickle(tmp_path / "x.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path):
    write_pickle(tmp_path / "x.pt", {"a": torch.zeros(1_000_000)})
    packed = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    with pytest.raises(ArtifactError, match="made to fill the memory"):
        read_pickle(packed)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model"])
def test_a_state_dict_inside_is_found(tmp_path: Path, key: str):
    torch.save({key: TENSORS}, tmp_path / "x.pt")
    assert list(read_pickle(tmp_path / "x.pt")) == list(TENSORS)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([torch.ones(1)], "holds list"),
        ({}, "holds dict"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch' is int"),
        ({"a": {"b": torch.ones(1)}}, "'a' is dict"),
        ({1: torch.ones(1)}, "a name is int"),
        ({"a": torch.ones(2).to_sparse()}, "in the layout torch.sparse"),
        ({"a": torch.zeros(1).expand(10**9)}, "larger than the whole file"),
        ({"a": torch.ones(2, device="meta")}, "has no numbers"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, value: Any, told: str):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=told):
        read_pickle(tmp_path / "x.pt")


def test_numbers_that_are_not_finite_are_refused_unless_allowed(tmp_path: Path):
    path = write_pickle(tmp_path / "x.pt", {"a": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ArtifactError, match="'a' has 1 of 2 NaN or infinite"):
        read_pickle(path)
    found = read_pickle(path, allow_nonfinite=True)
    assert found["a"].isnan().any()


def test_a_missing_file_names_its_neighbour(tmp_path: Path):
    write_pickle(tmp_path / "lora.pt", TENSORS)
    with pytest.raises(UserError, match=r"Did you mean 'lora\.pt'"):
        read_pickle(tmp_path / "lora.pth")


def test_an_old_torch_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_pickle(tmp_path / "x.pt", TENSORS)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(EnvironmentFault, match=r"torch 2\.9\.1\+cpu is too old"):
        read_pickle(path)


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("here")
    with pytest.raises((UserError, EnvironmentFault)):
        write_pickle(tmp_path / "file" / "x.pt", TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
