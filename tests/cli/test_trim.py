"""`rankwise trim` as a command: its promises, its table, and the change of the metric."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankwise.attaching import detach
from rankwise.cli.app import main
from rankwise.io.adapters import load_adapter
from rankwise.io.peft_alone import read_peft_alone
from rankwise.methods.adapter import adapter_of
from rankwise.train.config import FitConfig
from rankwise.train.restore import restore
from rankwise.train.run import fit

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], finished: Callable[[str], Path], tmp_path: Path
) -> Call:
    def run(*words: str | Path, adapter: Path | None = None) -> tuple[int, str, str]:
        source = adapter or finished("single")
        with pytest.raises(SystemExit) as caught:
            main(["trim", str(source), "--out", str(tmp_path / "cut"), *map(str, words)])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--r", "1"), "the best of that rank"),
        (("--energy", "0.9"), "the largest σ² over all layers"),
        (("--max-error", "0.3"), "no adapter that keeps this is smaller"),
        (("--budget", "0.2k"), "no adapter within the budget is nearer"),
        (("--prefix", "1"), "as they were trained"),
    ],
)
def test_every_promise_writes_an_adapter(
    call: Call, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    code, out, err = call(*words)
    assert code == 0, err
    assert told in out
    found = read_peft_alone(tmp_path / "cut").factors
    counted = sum(f.count() for f in found.values())
    assert f"parameters became {counted:,}" in out
    assert out.splitlines()[-1] == f"adapter: {tmp_path / 'cut'}"
    if "--budget" in words:
        assert counted <= 200


def test_the_metric_of_a_run_is_measured_beside_the_error(call: Call, rows: Path) -> None:
    code, out, err = call("--energy", "0.9", "--data", rows / "dev.tsv")
    assert code == 0, err
    assert re.search(r"^measured on 21 rows: accuracy .* → .* noise\.$", out, flags=re.MULTILINE)


def test_another_adapter_needs_the_name_of_its_base(
    call: Call, finished: Callable[[str], Path], rows: Path, bert: Path, tmp_path: Path
) -> None:
    adapter = finished("single") / "adapter"
    code, _, err = call("--r", "1", "--data", rows / "dev.tsv", adapter=adapter)
    assert code == 2
    assert "--model MODEL" in err
    assert not (tmp_path / "cut").exists()
    code, out, err = call("--r", "1", "--data", rows / "dev.tsv", "--model", bert, adapter=adapter)
    assert code == 0, err
    assert "measured on 21 rows" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "got nothing"),
        (("--r", "1", "--energy", "0.9"), "got --r and --energy"),
        (("--budget", "many"), "--budget must be a number"),
        (("--budget", "3"), "the smallest has 64"),
        (("--energy", "1.5"), "above 0 and at most 1"),
        (("--r", "0"), "r must be a whole number"),
        (("--r", "1", "--data", "nowhere.tsv"), "nowhere.tsv"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(
    call: Call, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    code, _, err = call(*words)
    assert code == 2
    assert told in err
    assert not (tmp_path / "cut").exists()


def test_a_run_with_trained_biases_knows_the_base_that_tells_them(
    call: Call,
    options: Callable[..., FitConfig],
    bert: Path,
    tmp_path: Path,
) -> None:
    """BERT's file has no name of the task's model in front of its biases."""
    run = fit(options(tmp_path / "run", bias="adapted", max_steps=2)).folder
    code, _, err = call("--r", "1", adapter=run)
    assert code == 0, err
    cut = read_peft_alone(tmp_path / "cut").adapter.biases
    restored = adapter_of(restore(run).base.model).biases
    assert cut.keys() == restored.keys()
    for name, added in restored.items():
        torch.testing.assert_close(cut[name], added, atol=1e-6, rtol=1e-5)
    alone = ("--out", tmp_path / "second", "--r", "1")
    code, _, err = call(*alone, adapter=run / "adapter")
    assert (code, "(--base)" in err) == (2, True)
    code, _, err = call(*alone, "--base", bert, adapter=run / "adapter")
    assert code == 0, err


def test_the_model_of_a_pipeline_can_be_named(call: Call, tmp_path: Path) -> None:
    names = {"unet": "a", "text_encoder": "b"}
    tensors = {
        f"{model}.{name}.lora_{side}.weight": torch.randn((2, 6) if side == "A" else (5, 2))
        for model, name in names.items()
        for side in "AB"
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    code, _, err = call("--r", "1", adapter=tmp_path / "pytorch_lora_weights.safetensors")
    assert (code, "--component" in err) == (2, True)
    words = ("--r", "1", "--component", "unet")
    code, _, err = call(*words, adapter=tmp_path / "pytorch_lora_weights.safetensors")
    assert code == 0, err
    assert list(read_peft_alone(tmp_path / "cut").factors) == ["a"]


def test_an_update_of_two_tied_layers_is_cut_on_the_model_of_its_run(
    call: Call, options: Callable[..., FitConfig], gpt2: Path, rows: Path, tmp_path: Path
) -> None:
    text = {"data": str(rows / "train.txt"), "eval": str(rows / "dev.txt"), "max_steps": 2}
    made = options(tmp_path / "run", model=str(gpt2), target_modules=["wte"], tied=True, **text)
    run = fit(made).folder
    code, out, err = call("--r", "1", adapter=run)
    assert code == 0, err
    assert "on the model" in out
    kept = restore(run).base.model
    detach(kept)
    load_adapter(kept, tmp_path / "cut")
    assert {f.r for f in adapter_of(kept).factors.values()} == {1}
    assert adapter_of(kept).method.tied
    code, _, err = call("--r", "1", "--out", tmp_path / "second", adapter=run / "adapter")
    assert (code, "--base MODEL" in err) == (2, True)
    words = ("--r", "1", "--out", tmp_path / "second", "--base", gpt2)
    code, _, err = call(*words, adapter=run / "adapter")
    assert code == 0, err
