import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.errors import ArtifactError, RankwiseError, UserError
from rankwise.train.config import FitConfig, dump_config
from rankwise.train.run import fit

Options = Callable[..., FitConfig]

PATIENCE = 120.0  # seconds; a slow machine is no failure


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rankwise", "fit", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Wait for something in the run folder, and fail when the process ends first."""
    end = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.002)


def lines(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    process.send_signal(number)
    _, told = process.communicate(timeout=PATIENCE)
    return process.returncode, told


def bits(folder: Path, look: Any) -> dict[str, bytes]:
    return {
        name: t.contiguous().view(torch.uint8).numpy().tobytes()
        if t.ndim
        else bytes(str(t), "utf8")
        for name, t in look.tensors(folder).items()
    }


def same_run(one: Path, other: Path, look: Any) -> None:
    """Adapters, optimiser, generators and log equal, the time apart."""
    assert look.log(one) == look.log(other)
    assert [p.name for p in look.checkpoints(one)] == [p.name for p in look.checkpoints(other)]
    newest = [look.checkpoints(run)[-1] for run in (one, other)]
    for parts in (
        [run / "adapter" for run in (one, other)],
        [one / "last", other / "last"],
        newest,
    ):
        found = [bits(part, look) for part in parts]
        assert len(found[0]) > 0
        assert found[0] == found[1], parts
    names = bits(newest[0], look)
    assert {n.partition("/")[0] for n in names} == {"param", "exp_avg", "exp_avg_sq", "step", "rng"}
    states = [json.loads((folder / "state.json").read_text()) for folder in newest]
    for state in states:
        state["progress"].pop("seconds")
        state["progress"].pop("log_bytes")  # the seconds in the log have unequal lengths
    assert states[0] == states[1]


def chain(config: FitConfig, tmp_path: Path, look: Any, blows: list[signal.Signals]) -> None:
    """A run that is hit again and again is bit for bit the run that was left alone."""
    alone = fit(config.model_copy(update={"out": str(tmp_path / "alone")})).folder
    every, run = lines(alone), Path(config.out)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    draw = random.Random(8)
    words = ["--config", str(file)]
    cuts = sorted(draw.sample(range(2, every - 3), len(blows)))
    for blow, cut in zip(blows, cuts, strict=True):
        process = start(*words)
        until(process, lambda cut=cut: lines(run) >= cut)
        if words[0] == "--config":
            with pytest.raises(UserError, match=f"Another run \\(process {process.pid}\\)"):
                fit(config, resume=True)
        time.sleep(draw.random() * 0.03)
        code, told = end(process, blow)
        words = ["--resume", "--out", str(run)]
        if blow == signal.SIGKILL:
            assert code == -signal.SIGKILL
            assert look.manifest(run)["status"] == "running"
        else:
            assert code == 128 + blow
            assert f"rankwise fit --resume --out {run}" in told
            assert "Traceback" not in told
            assert look.manifest(run)["status"] == "interrupted"
    process = start(*words)
    out, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    assert "Going on from step" in told
    assert f"adapter: {run}/adapter" in out
    same_run(alone, run, look)
    assert not list(run.rglob(".*.tmp"))


def test_a_run_that_is_killed_goes_on_bit_for_bit(
    options: Options, tmp_path: Path, look: Any
) -> None:
    """Dropout in the base and on the update; a checkpoint at every step, so kills hit writes."""
    config = options(
        tmp_path / "run", epochs=8, dropout=0.1, eval_every=5, save_minutes=0, lr=0.01, batch_size=7
    )
    chain(config, tmp_path, look, [signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])


def test_full_training_of_a_tied_model_does_too(
    options: Options, gpt2: Path, rows: Path, tmp_path: Path, look: Any
) -> None:
    files = {"data": str(rows / "train-prompts.jsonl"), "eval": str(rows / "dev-prompts.jsonl")}
    config = options(
        tmp_path / "run",
        model=str(gpt2),
        method="full",
        epochs=5,
        batch_size=4,
        accumulate=2,
        **files,
    )
    chain(config, tmp_path, look, [signal.SIGKILL])


def test_a_second_ctrl_c_ends_it_at_once(
    options: Options, rows: Path, tmp_path: Path, look: Any
) -> None:
    """In the middle of a step that takes very long."""
    header, *some = (rows / "train.tsv").read_text().splitlines()
    (tmp_path / "many.tsv").write_text("\n".join([header, *some * 200]))
    config = options(
        tmp_path / "run", data=str(tmp_path / "many.tsv"), batch_size=1, accumulate=10_000
    )
    (tmp_path / "run.yaml").write_text(dump_config(config))
    process = start("--config", str(tmp_path / "run.yaml"))
    run = tmp_path / "run"
    until(process, (run / "config.yaml").exists)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    began = time.monotonic()
    code, told = end(process, signal.SIGINT)
    assert code == 130
    assert time.monotonic() - began < 5
    assert "Traceback" not in told
    assert look.manifest(run)["status"] == "interrupted"


# -- what stands in the way of going on -----------------------------------------------------------


@pytest.fixture
def stopped(options: Options, rows: Path, bert: Path, tmp_path: Path) -> Callable[..., FitConfig]:
    """A run stopped at its fourth step, on files of its own, with a checkpoint at every step."""

    class Stop:
        def note(self, text: str) -> None: ...
        def start(self, what: str, total: int, done: int = 0) -> None: ...
        def finish(self) -> None: ...
        def advance(self, done: int, values: Any) -> None:
            if "loss" in values and done == 4:
                raise KeyboardInterrupt

    shutil.copytree(bert, tmp_path / "bert")
    shutil.copy(rows / "train.tsv", tmp_path / "train.tsv")
    config = options(
        tmp_path / "run",
        model=str(tmp_path / "bert"),
        data=str(tmp_path / "train.tsv"),
        save_minutes=0,
        keep_checkpoints=3,
        dropout=0.1,
    )

    def make() -> FitConfig:
        with pytest.raises(KeyboardInterrupt):
            fit(config, reporter=Stop())
        return config

    return make


def test_it_goes_on_from_the_newest(stopped: Any, witness: Any, look: Any, tmp_path: Path) -> None:
    config = stopped()
    assert [p.name[-1] for p in look.checkpoints(tmp_path / "run")] == ["1", "2", "3"]
    fit(config, resume=True, reporter=witness)
    assert "Going on from step 3 of 6" in witness.text
    alone = config.model_copy(update={"out": str(tmp_path / "alone")})
    same_run(fit(alone).folder, tmp_path / "run", look)


def test_a_damaged_newest_is_passed_over_and_told(
    stopped: Any, witness: Any, look: Any, tmp_path: Path
) -> None:
    config = stopped()
    newest = look.checkpoints(tmp_path / "run")[-1]
    (newest / "tensors.safetensors").write_bytes(b"")
    fit(config, resume=True, reporter=witness)
    assert "step-00000003 is damaged and passed over" in witness.text
    assert "Going on from step 2 of 6" in witness.text
    alone = config.model_copy(update={"out": str(tmp_path / "alone")})
    same_run(fit(alone).folder, tmp_path / "run", look)


def test_when_all_are_damaged_it_does_not_start_again_in_silence(
    stopped: Any, look: Any, tmp_path: Path
) -> None:
    config = stopped()
    for folder in look.checkpoints(tmp_path / "run"):
        (folder / "state.json").unlink()
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ArtifactError, match=r"No checkpoint .* is whole.*another --out"):
        fit(config, resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


def test_a_run_stopped_before_its_first_checkpoint_starts_at_the_start(
    stopped: Any, witness: Any, look: Any, tmp_path: Path
) -> None:
    config = stopped()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    fit(config, resume=True, reporter=witness)
    assert "Going on from step 0 of 6" in witness.text
    alone = config.model_copy(update={"out": str(tmp_path / "alone")})
    same_run(fit(alone).folder, tmp_path / "run", look)


def refused(config: FitConfig) -> str:
    with pytest.raises(RankwiseError) as caught:
        fit(config, resume=True)
    assert isinstance(caught.value, UserError)
    return str(caught.value)


def test_other_options_are_told_one_by_one(stopped: Any, tmp_path: Path, look: Any) -> None:
    config = stopped()
    message = refused(config.model_copy(update={"lr": 0.5, "batch_size": 16}))
    assert "--lr was None and is now 0.5" in message
    assert "--batch-size was 8 and is now 16" in message
    assert "--epochs" not in message
    assert look.manifest(tmp_path / "run")["status"] == "interrupted"


def test_other_data_is_refused(stopped: Any, tmp_path: Path) -> None:
    config = stopped()
    file = tmp_path / "train.tsv"
    file.write_text(file.read_text().replace("the", "its", 1))
    assert "the train data is not what it was" in refused(config)


def test_another_base_is_refused(stopped: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = stopped()
    file = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(file)
    tensors["pooler.dense.bias"] += 1
    save_file(tensors, file, {"format": "pt"})
    assert "the weights of the base are not what they were" in refused(config)


def test_a_finished_run_is_not_resumed(
    finished: Callable[[str], Path], options: Options, tmp_path: Path
) -> None:
    assert "is finished" in refused(options(finished("single")))


def test_what_is_no_run_is_not_resumed(options: Options, tmp_path: Path) -> None:
    assert "no run folder" in refused(options(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    assert "no manifest.json" in refused(options(tmp_path / "empty"))


def test_flags_beside_resume_are_compared_with_the_run_s(stopped: Any, tmp_path: Path) -> None:
    stopped()
    process = start("--resume", "--out", str(tmp_path / "run"), "--lr", "0.25")
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "--lr was None and is now 0.25" in told
    assert "Traceback" not in told
