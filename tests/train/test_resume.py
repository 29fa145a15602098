import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rich.default_styles  # noqa: F401  its first import draws from Python's generator
import torch

from rankwise.cli.app import main
from rankwise.errors import ArtifactError, RankwiseError, UserError
from rankwise.train.config import FitConfig
from rankwise.train.config_file import dump_config
from rankwise.train.resume import config_of_run
from rankwise.train.run import fit

Options = Callable[..., FitConfig]

PATIENCE = 120.0  # seconds; a slow machine is no failure


class Run:
    """`rankwise` in a process of its own, forked from one that has imported everything already."""

    def __init__(self, nursery: subprocess.Popen[str], folder: Path, words: list[str]) -> None:
        self.nursery, self.folder = nursery, folder
        assert nursery.stdin is not None
        nursery.stdin.write(json.dumps([str(folder), words]) + "\n")
        nursery.stdin.flush()
        self.pid = self._answer()

    def _answer(self) -> int:
        assert self.nursery.stdout is not None
        return int(self.nursery.stdout.readline())

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something in the run folder, and fail when the process ends first."""
        end = time.monotonic() + PATIENCE
        while not happened():
            over = (self.folder / "over").exists() or time.monotonic() > end
            assert not over, self.told()
            time.sleep(0.002)

    def end(self, number: signal.Signals | None = None) -> int:
        """The exit code, after a signal where one is named."""
        if number is not None:
            os.kill(self.pid, number)
        return self._answer()

    def told(self) -> str:
        return (self.folder / "err").read_text() if (self.folder / "err").exists() else ""

    def printed(self) -> str:
        return (self.folder / "out").read_text()


NURSERY = """
import json, os, sys
import scipy.stats, sklearn.metrics, torch, transformers
import transformers.models.bert.modeling_bert, transformers.models.gpt2.modeling_gpt2
from pathlib import Path
from rankwise.cli import main
import rankwise.train.run
torch.set_num_threads(int(sys.argv[1]))
for line in sys.stdin:
    folder, words = json.loads(line)
    for name in ("out", "err", "over"):
        Path(folder, name).unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
        code = 0
        try:
            main(words)
        except SystemExit as left:
            code = left.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path(folder, "over").touch()
    print(code, flush=True)
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported what a run needs, and forks one for each line it is sent."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork a process")
    command = [sys.executable, "-c", NURSERY, str(torch.get_num_threads())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe) as process:
        yield process
        process.kill()


def lines(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


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
    places = *([run / part for run in (one, other)] for part in ("adapter", "last")), newest
    for parts in places:
        found = [bits(part, look) for part in parts]
        assert len(found[0]) > 0
        assert found[0] == found[1], parts
    names = bits(newest[0], look)
    assert {n.partition("/")[0] for n in names} == {"param", "exp_avg", "exp_avg_sq", "step", "rng"}
    states = [json.loads((folder / "state.json").read_text()) for folder in newest]
    for state in states:
        for time_spent in ("seconds", "eval_seconds"):
            state["progress"].pop(time_spent)
        state["progress"].pop("log_bytes")  # the seconds in the log have unequal lengths
    assert states[0] == states[1]


Chain = Callable[[FitConfig, list[signal.Signals]], None]


@pytest.fixture
def chain(nursery: subprocess.Popen[str], tmp_path: Path, look: Any) -> Chain:
    """Hit a run again and again, and compare it in the end with one that was left alone."""

    def strike(run: Run, folder: Path, blow: signal.Signals) -> None:
        code = run.end(blow)
        if blow == signal.SIGKILL:
            assert code == -signal.SIGKILL
            assert look.manifest(folder)["status"] == "running"
        else:
            assert code == 128 + blow
            assert f"rankwise fit --resume --out {folder}" in run.told()
            assert "Traceback" not in run.told()
            assert look.manifest(folder)["status"] == "interrupted"

    def go(config: FitConfig, blows: list[signal.Signals]) -> None:
        alone = fit(config.model_copy(update={"out": str(tmp_path / "alone")})).folder
        folder = Path(config.out)
        (tmp_path / "run.yaml").write_text(dump_config(config))
        words = ["fit", "--config", str(tmp_path / "run.yaml")]
        draw = random.Random(8)
        cuts = sorted(draw.sample(range(2, lines(alone) - 3), len(blows)))
        for blow, cut in zip(blows, cuts, strict=True):
            run = Run(nursery, tmp_path, words)
            if words[1] == "--resume":  # the log is there from before
                run.until(lambda run=run: "Going on from step" in run.told())
                cut = max(cut, lines(folder) + 1)
            run.until(lambda cut=cut: lines(folder) >= cut)
            if words[1] == "--config":
                with pytest.raises(UserError, match=rf"Another run \(process {run.pid}\)"):
                    fit(config, resume=True)
            time.sleep(draw.random() * 0.02)
            strike(run, folder, blow)
            words = ["fit", "--resume", "--out", str(folder)]
        run = Run(nursery, tmp_path, words)
        assert run.end() == 0, run.told()
        assert "Going on from step" in run.told()
        assert f"adapter: {folder}/adapter" in run.printed()
        same_run(alone, folder, look)
        assert not list(folder.rglob(".*.tmp"))

    return go


def test_a_run_that_is_killed_goes_on_bit_for_bit(
    chain: Chain, options: Options, tmp_path: Path
) -> None:
    """Dropout in the base and on the update; a checkpoint at every step, so kills hit writes."""
    config = options(
        tmp_path / "run", epochs=8, dropout=0.1, eval_every=5, save_minutes=0, lr=0.01, batch_size=7
    )
    chain(config, [*[signal.SIGKILL] * 6, signal.SIGINT, signal.SIGTERM])


def test_full_training_of_a_tied_model_does_too(
    chain: Chain, options: Options, gpt2: Path, rows: Path, tmp_path: Path
) -> None:
    """With checkpoints at the end of an epoch alone, so that steps are done again."""
    files = {"data": str(rows / "train-prompts.jsonl"), "eval": str(rows / "dev-prompts.jsonl")}
    more = {"method": "full", "epochs": 6, "batch_size": 4, "accumulate": 2}
    config = options(tmp_path / "run", model=str(gpt2), **more, **files)
    chain(config, [signal.SIGKILL] * 3)


def test_a_second_ctrl_c_ends_it_at_once(
    nursery: subprocess.Popen[str], options: Options, rows: Path, tmp_path: Path, look: Any
) -> None:
    """In the middle of a step that takes very long."""
    header, *some = (rows / "train.tsv").read_text().splitlines()
    (tmp_path / "many.tsv").write_text("\n".join([header, *some * 200]))
    folder = tmp_path / "run"
    config = options(folder, data=str(tmp_path / "many.tsv"), batch_size=1, accumulate=10_000)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    run = Run(nursery, tmp_path, ["fit", "--config", str(tmp_path / "run.yaml")])
    run.until((folder / "config.yaml").exists)
    time.sleep(0.5)
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.5)
    assert not (tmp_path / "over").exists()
    began = time.monotonic()
    assert run.end(signal.SIGINT) == 130
    assert time.monotonic() - began < 5
    assert "Traceback" not in run.told()
    assert look.manifest(folder)["status"] == "interrupted"


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

    def make(**more: Any) -> FitConfig:
        changed = config.model_copy(update=more)
        with pytest.raises(KeyboardInterrupt):
            fit(changed, reporter=Stop())
        return changed

    return make


def test_it_goes_on_from_the_newest(stopped: Any, witness: Any, look: Any, tmp_path: Path) -> None:
    config = stopped()
    assert [p.name[-1] for p in look.checkpoints(tmp_path / "run")] == ["1", "2", "3"]
    fit(config, resume=True, reporter=witness)
    assert "Going on from step 3 of 6" in witness.text
    alone = config.model_copy(update={"out": str(tmp_path / "alone")})
    same_run(fit(alone).folder, tmp_path / "run", look)


def test_the_time_of_evaluations_goes_on_too(stopped: Any, look: Any, tmp_path: Path) -> None:
    def stored() -> float:
        newest = look.checkpoints(tmp_path / "run")[-1]
        return json.loads((newest / "state.json").read_text())["progress"]["eval_seconds"]

    config = stopped(eval_every=1)
    before = stored()
    assert before > 0
    result = fit(config, resume=True)
    assert result.manifest["seconds"]["eval"] == stored() > before


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
    assert "No checkpoint was written; starting again from step 0" in witness.text
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
    assert "--lr was 0.001 and is now 0.5" in message
    assert "--batch-size was 8 and is now 16" in message
    assert "--epochs" not in message
    assert look.manifest(tmp_path / "run")["status"] == "interrupted"


def test_another_kind_of_device_is_refused(stopped: Any, tmp_path: Path, look: Any) -> None:
    """Before anything is read: it would be neither the same arithmetic nor the same numbers."""
    config = stopped()
    told = look.manifest(tmp_path / "run")
    told["hardware"]["device_type"] = "cuda"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(told))
    (tmp_path / "train.tsv").unlink()
    assert re.search("was begun on cuda.*--device cuda", refused(config))


def test_what_changes_no_number_may_be_named(stopped: Any, tmp_path: Path) -> None:
    stopped(device="auto")
    file = tmp_path / "run" / "manifest.json"  # as of a version without this option
    file.write_text(re.sub(r'"(recompute|base_dropout)": false,', "", file.read_text()))
    assert config_of_run(tmp_path / "run", {"device": "cpu"}).base_drops
    named = config_of_run(tmp_path / "run", {"device": "cpu", "recompute": True})
    assert fit(named, resume=True).manifest["status"] == "finished"


def test_options_are_compared_before_anything_is_read(stopped: Any, tmp_path: Path) -> None:
    config = stopped()
    shutil.rmtree(tmp_path / "bert")
    (tmp_path / "train.tsv").unlink()
    with pytest.raises(UserError, match=r"--r was 2 and is now 4; --seed was 0 and is now 1"):
        config_of_run(config.out, {"r": "4", "seed": 1, "lr": "1e-3"})
    assert config_of_run(config.out, {"r": "2"}) == config


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


def test_a_finished_run_is_not_resumed(finished: Any, options: Options, tmp_path: Path) -> None:
    assert "is finished" in refused(options(finished("single")))


def test_what_is_no_run_is_not_resumed(options: Options, tmp_path: Path) -> None:
    assert "no run folder" in refused(options(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    assert "no manifest.json" in refused(options(tmp_path / "empty"))


def test_flags_beside_resume_are_compared(stopped: Any, tmp_path: Path, capsys: Any) -> None:
    stopped()
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--resume", "--out", str(tmp_path / "run"), "--lr", "0.25"])
    assert "--lr was 0.001 and is now 0.25" in capsys.readouterr().err
