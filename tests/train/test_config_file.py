from pathlib import Path

import pytest

from rankwise.errors import UserError
from rankwise.train.config import make_config
from rankwise.train.config_file import read_config


def test_a_file_is_read_like_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# a comment\nmodel: m\ndata: d\nout: o\nlr: 1e-4\nlayers: 0-3\n")
    values = read_config(str(file))
    assert make_config(values, "file") == make_config(
        {"model": "m", "data": "d", "out": "o", "lr": "1e-4", "layers": "0-3"}, "flags"
    )


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert read_config(str(file)) == {}


def test_files_that_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndata: [d\nout: o\n")
    with pytest.raises(UserError, match=r"run\.yaml:\d is not YAML"):
        read_config(str(tmp_path / "run.yaml"))
    with pytest.raises(UserError, match=r"Did you mean '.*run\.yaml'"):
        read_config(str(tmp_path / "rum.yaml"))
    (tmp_path / "list.yaml").write_text("- model\n")
    with pytest.raises(UserError, match="not a list"):
        read_config(str(tmp_path / "list.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(str(tmp_path / "bytes.yaml"))


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    sign = tmp_path / "ran"
    file = tmp_path / "bad.yaml"
    file.write_text(f"model: !!python/object/apply:pathlib.Path.touch ['{sign}']\n")
    with pytest.raises(UserError):
        read_config(str(file))
    assert not sign.exists()
