"""A JSON file is read up to its limit, and each way to be no object has its words."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.errors import ArtifactError, UserError
from rankwise.io.json_files import read_json


def test_an_object_is_read(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"r": 8}')
    assert read_json(tmp_path / "x.json", limit=8) == {"r": 8}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ('{"r": 80}', "larger than 8 bytes"),
        ("[1]", "must be a JSON object"),
        ('{"r"', "not valid JSON"),
    ],
)
def test_what_is_none_is_refused(text: str, told: str, tmp_path: Path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArtifactError, match=told):
        read_json(tmp_path / "x.json", limit=8)


def test_what_is_not_there_is_said(tmp_path: Path):
    with pytest.raises(UserError, match=r"There is no 'x\.json'"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path)
