"""`rankwise fit`: flags and YAML are one thing, and what it prints can be acted on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rankwise.cli.app import main
from rankwise.train.config import FitConfig


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.fixture
def words(bert: Path, rows: Path, tmp_path: Path) -> list[str | Path]:
    common = ["fit", "--model", bert, "--data", rows / "train.tsv", "--eval", rows / "dev.tsv"]
    return [*common, "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "run"]


def test_flags_train_and_say_what_came_of_it(
    words: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = left(*words, "--r", "2", "--target-modules", "query,value", "--epochs", "1")
    out, err = capsys.readouterr()
    assert code == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert f"accuracy {manifest['metrics']['accuracy']:.4f}" in out
    assert f"{manifest['counts']['trainable']:,} of" in out
    assert f"rankwise merge {tmp_path / 'run'}" in out
    assert "Trained whole and saved with the adapter: classifier" in err


def test_a_yaml_file_is_the_same_as_flags(
    words: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left(*words, "--r", "3", "--lr", "2e-3", "--print-config") == 0
    by_flags = yaml.safe_load(capsys.readouterr().out)
    values = {k: v for k, v in by_flags.items() if k not in ("r", "lr")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values) + "r: 16\nlr: 2e-3\n")
    assert left("fit", "--config", file, "--r", "3", "--print-config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == by_flags


def test_print_config_shows_every_option_and_trains_nothing(
    words: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left(*words, "--print-config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert list(shown) == list(FitConfig.model_fields)
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_of_a_file_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rte: 1\nmodel: m\nbatch_sise: 4\n")
    assert left("fit", "--config", file) == 2
    told = capsys.readouterr().err
    assert "'learning_rte' is no option" in told
    assert "Did you mean 'batch_size'" in told
    assert "data (--data) is required" in told


def test_resume_needs_no_other_flag_than_out(
    words: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left(*words, "--r", "2", "--epochs", "1") == 0
    capsys.readouterr()
    assert left("fit", "--resume", "--out", tmp_path / "run") == 2
    assert "finished" in capsys.readouterr().err
    assert left("fit", "--resume") == 2
    assert "--out" in capsys.readouterr().err


def test_the_config_of_a_run_folder_can_be_used_again(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished("single") / "config.yaml"
    assert left("fit", "--config", file, "--out", tmp_path / "again", "--print-config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == yaml.safe_load(file.read_text()) | {"out": str(tmp_path / "again")}
    assert shown["alpha"] == 4


def test_all_that_is_wrong_with_the_flags_is_told_at_once(
    words: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert left(*words, "--r", "zero", "--epochs", "-1", "--task", "regresion") == 2
    err = capsys.readouterr().err
    assert "r (--r) should be a valid integer" in err
    assert "epochs (--epochs) should be greater than 0, got '-1'." in err
    assert "Did you mean 'regression'?" in err


def test_flags_of_another_method_are_refused_and_keys_of_a_file_are_not(
    words: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left(*words, "--method", "bitfit", "--r", "4", "--dora") == 2
    err = capsys.readouterr().err
    assert "--method bitfit:" in err
    assert "--r means nothing to it; it is for --method lora." in err
    (tmp_path / "run.yaml").write_text("r: 4\n")
    assert (
        left(*words, "--config", tmp_path / "run.yaml", "--method", "bitfit", "--print-config") == 0
    )
    for command in ("plan", "count"):
        model = [words[2]] if command == "count" else ["--model", words[2]]
        assert left(command, *model, "--method", "head", "--r", "4") == 2


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (SystemExit, 143)])
def test_stopped_while_it_loads_it_says_how_to_go_on(
    words: list[str | Path],
    tmp_path: Path,
    stop: type[BaseException],
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert left(*words, "--r", "2", "--epochs", "1") == 0

    def stopped(*_: object, **__: object) -> None:
        raise stop(code)

    monkeypatch.setattr("rankwise.train.run.fit", stopped)
    again = [*words[:-1], tmp_path / "other"]
    for arguments, said in (
        (["fit", "--resume", "--out", tmp_path / "run"], f"--resume --out {tmp_path / 'run'}"),
        (again, "Nothing was begun; the same command begins again."),
    ):
        capsys.readouterr()
        assert left(*arguments) == code
        assert capsys.readouterr().err.strip().endswith(f"{said}\n\nStopped.")
