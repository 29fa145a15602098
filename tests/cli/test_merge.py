"""`rankwise merge`: a plain folder, and one line of evidence."""

from __future__ import annotations

import json
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
