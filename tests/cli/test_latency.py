"""`rankwise latency`: the tables, the folder, and mistakes; never how long anything took."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.cli.app import main

FEW = ("--batch-sizes", "1", "--lengths", "8", "--rounds", "3", "--dtype", "float32")


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


def test_the_table_has_every_variant_and_the_folder_is_written_again(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert left("latency", llama / "config.json", *FEW, "--out", out) == 0
        shown = capsys.readouterr().out
        for name in ("plain", "merged", "LoRA, unmerged", "adapter, Houlsby", "prefix"):
            assert f"\n{name}" in shown
        assert "The merged model is the plain model's computation" in shown
        assert f"report: {out / 'report.html'}" in shown
        assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--batch-sizes", "1,x"), "no list of whole numbers"),
        (("--lengths", "0"), "lengths must be whole numbers of 1 or more"),
        (("--rounds", "2"), "--rounds"),
        (("--lengths", "1000"), "takes 64 at most"),
        (("--target-modules", "qury", "--lengths", "8"), "Did you mean 'query'"),
        (("--batch-size", "1"), "--batch-size"),
    ],
)
def test_mistakes_leave_with_2(
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    assert left("latency", bert, "--out", tmp_path / "out", *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_leaves_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left("latency", tmp_path / "nothing.json") == 2
    assert "nothing.json" in capsys.readouterr().err
