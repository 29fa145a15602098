"""`rankwise estimate`: the tables, the same as JSON, budgets, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.cli.app import main

SMALL = (
    "--pack",
    "no",
    "--batch-size",
    "2",
    "--max-length",
    "16",
    "--eval-batch-size",
    "2",
    "--dtype",
    "float32",
)


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


def test_the_table_and_the_json_agree(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("estimate", bert / "config.json", *SMALL)
    assert left(*words, "--budget", "64GiB", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["peak"] == max(made["phases"].values())
    assert made["budget"]["bytes"] == 64 << 30
    assert set(made["step"]) == {
        *(
            "weights",
            "packed copies",
            "gradients",
            "optimiser state",
            "logits and loss",
            "activations",
        ),
    }
    assert left(*words) == 0
    shown = capsys.readouterr().out
    assert "LoRA r=8 on cpu, passes of 2 rows of 16 tokens" in shown
    for line in ("weights", "optimiser state", "logits and loss", "activations", "loading"):
        assert f"\n{line}" in shown
    assert "Not in it:" in shown
    assert "fit" not in shown.partition("Peak:")[2].replace("rankwise fit", "")


def test_what_fits_is_told(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert left("estimate", bert, *SMALL, "--budget", "64GB") == 0
    assert "The run fits in 64 GB." in capsys.readouterr().out
    assert left("estimate", bert, *SMALL, "--budget", "1MB") == 0
    shown = capsys.readouterr().out
    assert "The run does not fit in 1 MB." in shown
    assert "whose training steps fit: none, not even 1" in shown
    assert "The evaluation alone needs" in shown
    assert "lower --eval-batch-size (now 2)" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--budget", "8"), "Give a number and a unit: 8GiB"),
        (("--budget", "8 GiBs"), "Give a number and a unit"),
        (("--budget", "0GB"), "Give a number and a unit"),
        (("--batch-sise", "8"), "--batch-sise"),
        (("--batch-size", "0"), "--batch-size"),
        (("--method", "lra"), "Did you mean 'lora'"),
        (("--target-modules", "qury"), "Did you mean 'query'"),
        (("--method", "full", "--dtype", "bfloat16"), "full fine-tuning trains the base itself"),
    ],
)
def test_mistakes_leave_with_2(
    bert: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    assert left("estimate", bert, *words) == 2
    assert told in capsys.readouterr().err


def test_a_model_that_is_not_there_leaves_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left("estimate", tmp_path / "nothing.json") == 2
    assert "nothing.json" in capsys.readouterr().err
