"""`rankwise merge`: a plain folder, and one line of evidence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rankwise.cli.app import main


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


def test_the_merged_folder_needs_no_rankwise(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, out = finished("single"), tmp_path / "merged"
    assert left("merge", run, "--out", out) == 0
    told = capsys.readouterr().out
    assert "certificate passed" in told
    assert "; measured on 16 rows of " in told
    assert json.loads((out / "certificate.json").read_text())["passed"] is True
    assert left("predict", run, "--text", "good film") == 0
    row = json.loads(capsys.readouterr().out)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    batch = AutoTokenizer.from_pretrained(out)("good film", return_tensors="pt")
    with torch.no_grad():
        shares = model(**batch).logits.softmax(-1)[0]
    assert model.config.id2label[int(shares.argmax())] == row["label"]
    assert shares.tolist() == pytest.approx(list(row["probabilities"].values()), abs=1e-5)


def test_further_files_are_written_beside_the_weights(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert left("merge", finished("single"), "--out", out, "--torch-export") == 0
    assert "model.pt2 (torch-export): run on inputs of 2 shape(s)" in capsys.readouterr().err
    (told,) = json.loads((out / "certificate.json").read_text())["exports"]
    assert told["format"] == "torch-export"
    assert all(check["error"] <= check["tolerance"] for check in told["checks"])
    assert (out / "tokenizer.json").exists()
    program = torch.export.load(out / "model.pt2").module()
    ids = torch.tensor([[2, 5, 3]])
    given = {name: torch.zeros_like(ids) for name in told["inputs"]}
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert program(**given)["logits"].shape == (1, 2)


@pytest.mark.slow
def test_an_onnx_file_is_written_beside_the_weights(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert left("merge", finished("pair"), "--out", out, "--onnx") == 0
    assert "model.onnx (onnx): run on inputs of 2 shape(s)" in capsys.readouterr().err
    (told,) = json.loads((out / "certificate.json").read_text())["exports"]
    assert told["longest"] == {"batch": None, "length": 64}
    assert (out / "model.onnx").stat().st_size > 0


def test_onnx_without_its_packages_says_what_to_install(
    finished: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert left("merge", finished("single"), "--out", tmp_path / "new", "--onnx") == 4
    assert 'pip install "rankwise[onnx]"' in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "told"), [(("--dtype", "int8"), "--dtype"), (("--out", "."), "not empty")]
)
def test_mistakes_are_told(
    finished: Callable[[str], Path],
    tmp_path: Path,
    words: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "something").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert left("merge", finished("single"), "--out", "new", *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
