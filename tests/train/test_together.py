"""Runs that train together are the runs that they are alone."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from rankwise.errors import UserError
from rankwise.merging.effect import EffectError
from rankwise.train.config import FitConfig
from rankwise.train.loop import Diverged
from rankwise.train.run import FitResult, fit
from rankwise.train.signals import Interrupted
from rankwise.train.together import Apart, fit_together, likeness

Options = Callable[..., FitConfig]
KINDS: dict[str, dict[str, Any]] = {
    "query and value": {},
    "all linear": {"target_modules": ["all-linear"], "recompute": True, "accumulate": 2},
    "scores": {"task": "regression", "rows": "{}-scores.tsv"},
    "prompts": {"model": "gpt2", "rows": "{}-prompts.jsonl"},
    "dora": {"dora": True},
    "bitfit": {"method": "bitfit", "r": None},
    "bottleneck": {"method": "bottleneck", "r": None},
    "prefix": {"method": "prefix", "r": None},
    "head": {"method": "head", "r": None},
}


def grid(options: Options, folder: Path, names: Path, **more: Any) -> list[FitConfig]:
    """Three runs that differ in their ranks and rates."""
    pattern = more.pop("rows", None)
    if pattern:
        more |= {n: str(names / pattern.format(f)) for n, f in (("data", "train"), ("eval", "dev"))}
    own = [{"r": 1, "lr": 1e-2}, {"r": 4, "alpha": 3.0, "lr": 3e-3}, {"r": 2, "lr": 1e-3}]
    return [
        options(folder / f"run{i}", **{**(each if "r" not in more else {"lr": each["lr"]}), **more})
        for i, each in enumerate(own)
    ]


def learned(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((folder / "adapter").rglob("*.safetensors")):
        found |= {f"{file.name} {name}": tensor for name, tensor in load_file(file).items()}
    return found


def losses(folder: Path) -> list[float]:
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event["loss"] for event in events]


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_run_is_the_one_that_it_is_alone(
    kind: str, options: Options, gpt2: Path, rows: Path, tmp_path: Path
) -> None:
    more = dict(KINDS[kind])
    if "model" in more:
        more["model"] = str(gpt2)
    together = grid(options, tmp_path / "together", rows, **more)
    apart = grid(options, tmp_path / "apart", rows, **more)
    assert len({likeness(config) for config in together}) == 1
    ended: list[str] = []
    fit_together(together, lambda config, _: ended.append(config.out))
    assert ended == [config.out for config in together]
    for ours, alone in zip(together, apart, strict=True):
        fit(alone)
        one, other = learned(Path(ours.out)), learned(Path(alone.out))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5, msg=name)
        assert losses(Path(ours.out)) == pytest.approx(losses(Path(alone.out)), rel=1e-4)
        manifests = [json.loads((Path(c.out) / "manifest.json").read_text()) for c in (ours, alone)]
        assert [m["together"] for m in manifests] == [3, 1]
        assert manifests[0]["memory"] is None
        assert manifests[0]["metrics"] == pytest.approx(manifests[1]["metrics"], rel=1e-3)
        for key in ("status", "method", "counts", "data", "base"):
            assert manifests[0][key] == manifests[1][key], key


def same(ours: FitConfig, alone: FitConfig) -> None:
    one, other = learned(Path(ours.out)), learned(Path(alone.out))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5, msg=name)


def nothing(config: FitConfig, result: FitResult | Diverged) -> None:
    del config
    assert isinstance(result, FitResult)


def test_in_bfloat16_each_head_keeps_its_own_format(options: Options, tmp_path: Path) -> None:
    more = {"dtype": "bfloat16", "max_steps": 2, "r": 2}
    pair = [options(tmp_path / f"{i}", lr=10**-i, **more) for i in (2, 3)]
    alone = options(tmp_path / "alone", lr=1e-2, **more)
    fit_together(pair, nothing)
    fit(alone)
    one, other = learned(tmp_path / "2"), learned(tmp_path / "alone")
    assert {t.dtype for t in one.values()} == {torch.float32}
    for name, tensor in one.items():  # a product in bfloat16 may be summed in another order
        torch.testing.assert_close(tensor, other[name], rtol=0.05, atol=2e-3, msg=name)


def test_one_that_diverges_leaves_and_the_others_are_as_they_would_be(
    options: Options, rows: Path, tmp_path: Path
) -> None:
    wild = options(tmp_path / "wild", r=3, lr=1e30, max_grad_norm=1e30, max_skipped=2)
    tame, *_ = grid(options, tmp_path / "together", rows)
    alone, *_ = grid(options, tmp_path / "apart", rows)
    found: dict[str, FitResult | Diverged] = {}
    fit_together([wild, tame], lambda config, result: found.update({config.out: result}))
    fit(alone)
    assert isinstance(found[wild.out], Diverged)
    assert isinstance(found[tame.out], FitResult)
    told = json.loads((tmp_path / "wild" / "manifest.json").read_text())
    assert (told["status"], told["diverged"]) == ("failed", True)
    same(tame, alone)


class Stopping:
    """A reporter that sends a signal to its own process as a step is told of."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, what: str, total: int, done: int = 0) -> None:
        del what, total, done

    def advance(self, done: int, values: Any) -> None:
        del values
        if done == self.step:
            os.kill(os.getpid(), self.number)

    def finish(self) -> None:
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("behind", [False, True], ids=["abreast", "one is behind"])
def test_runs_that_are_stopped_go_on(
    options: Options, rows: Path, tmp_path: Path, behind: bool
) -> None:
    more = {"epochs": 2, "save_minutes": 0}
    together = grid(options, tmp_path / "together", rows, **more)
    apart = grid(options, tmp_path / "apart", rows, **more)
    stopping = Stopping(4, signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        fit_together(together, nothing, reporter=stopping)
    assert caught.value.number == signal.SIGINT
    folders = [Path(config.out) for config in together]
    for folder in folders:
        assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    if behind:  # as where the process was killed while it wrote
        newest = max((folders[1] / "checkpoints").iterdir())
        shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    fit_together(together, nothing, resume=[str(f) for f in folders], reporter=stopping)
    going_on = [note for note in stopping.notes if "Going on" in note]
    at = (5, 4 if behind else 5, 5)
    assert going_on == [f"run{i}: Going on from step {n} of 12." for i, n in enumerate(at)]
    for ours, alone in zip(together, apart, strict=True):
        fit(alone)
        same(ours, alone)
        assert losses(Path(ours.out)) == pytest.approx(losses(Path(alone.out)), rel=1e-4)


@pytest.mark.parametrize("alike", [True, False])
def test_runs_that_go_on_keep_the_kernels_they_had(
    options: Options, rows: Path, tmp_path: Path, alike: bool
) -> None:
    runs = grid(options, tmp_path, rows, epochs=2)
    with pytest.raises(Interrupted):
        fit_together(runs, nothing, reporter=Stopping(2, signal.SIGINT))
    manifests = [Path(config.out) / "manifest.json" for config in runs]
    for path in manifests if alike else manifests[:1]:
        told = json.loads(path.read_text())
        told["hardware"]["attention_by_products"] = 32  # of a float32 model it is 0
        path.write_text(json.dumps(told))
    going_on = [config.out for config in runs]
    if not alike:
        with pytest.raises(Apart, match="different kernels"):
            fit_together(runs, nothing, resume=going_on)
        return
    fit_together(runs, nothing, resume=going_on)
    for path in manifests:
        assert json.loads(path.read_text())["hardware"]["attention_by_products"] == 32


@contextmanager
def room_for(most: int) -> Iterator[list[int]]:
    """Let training passes of more rows run out of memory; the sizes of the others are noted."""
    sizes: list[int] = []

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if module.training and type(module).__name__ == "BertForSequenceClassification":
            if len(output.logits) > most:
                raise torch.OutOfMemoryError("as if there were no more")
            sizes.append(len(output.logits))

    handle = register_module_forward_hook(hook)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize(("most", "first"), [(16, [16, 8]), (8, [8, 8, 8]), (4, [4] * 6)])
def test_where_memory_runs_out_fewer_share_a_pass(
    options: Options, rows: Path, tmp_path: Path, witness: Any, most: int, first: list[int]
) -> None:
    together = grid(options, tmp_path / "together", rows, max_steps=3)
    alone, *_ = grid(options, tmp_path / "apart", rows, max_steps=3)
    with room_for(most) as sizes:
        fit_together(together, nothing, reporter=witness)
    fit(alone)
    same(together[0], alone)
    assert sizes[-len(first) :] == first
    assert "of the runs share a pass from now on" in witness.text
    passes = json.loads((Path(together[0].out) / "manifest.json").read_text())["micro_batch"]
    assert passes == min(8, most)


def test_what_draws_numbers_or_differs_in_its_rows_trains_by_itself(
    options: Options, tmp_path: Path
) -> None:
    plain = options(tmp_path / "a")
    assert likeness(plain) == likeness(options(tmp_path / "b", r=7, lr=0.1, head_lr=0.2, alpha=1))
    for more in (
        {"dropout": 0.1},
        {"base_dropout": True},
        {"method": "full"},
        {"cache": 1.0},
        {"train_nested": True},
        {"tied": True},
        {"gradient_checkpointing": True},
        {"init": "lora-ga"},
    ):
        assert likeness(options(tmp_path / "c", **more)) is None, more
    for more in ({"seed": 1}, {"batch_size": 4}, {"limit": 9}, {"layers": [0]}, {"metric": "f1"}):
        assert likeness(options(tmp_path / "c", **more)) not in (None, likeness(plain)), more
    with pytest.raises(UserError, match="all but their ranks and rates"):
        fit_together([plain, options(tmp_path / "c", seed=1)], nothing)
    assert not (tmp_path / "a").exists()


def test_a_head_with_dropout_keeps_its_runs_apart(
    options: Options, roberta: Path, tmp_path: Path
) -> None:
    pair = [options(tmp_path / f"{r}", model=str(roberta), r=r) for r in (1, 2)]
    with pytest.raises(Apart, match=r"'classifier.*dropout' trains and has dropout"):
        fit_together(pair, nothing)


@pytest.mark.parametrize("more", [{}, {"init": "pissa"}], ids=["kaiming", "pissa"])
def test_every_run_starts_where_it_starts_alone(
    options: Options, tmp_path: Path, more: dict[str, Any]
) -> None:
    """At a rate of nothing what is saved is the start, though fit calls that an error."""
    still = {"lr": 1e-30, "max_steps": 1, "dtype": "bfloat16", **more}
    together = [options(tmp_path / f"{i}", r=i + 1, **still) for i in range(3)]
    with pytest.raises(EffectError):
        fit_together(together, nothing)
    for i in range(3):
        with pytest.raises(EffectError):
            fit(options(tmp_path / f"alone{i}", r=i + 1, **still))
        one, other = learned(tmp_path / f"{i}"), learned(tmp_path / f"alone{i}")
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_block_that_trains_whole_shares_no_cache(
    options: Options, llama: Path, rows: Path, tmp_path: Path
) -> None:
    files = {n: str(rows / f"{f}-prompts.jsonl") for n, f in (("data", "train"), ("eval", "dev"))}
    more = {"model": str(llama), **files, "max_steps": 2, "modules_to_save": ["model.layers.1"]}
    more["layers"] = [0]
    pair = [options(tmp_path / f"{r}", r=r, **more) for r in (1, 2)]
    fit_together(pair, nothing)
    alone = options(tmp_path / "alone", r=2, **more)
    fit(alone)
    same(pair[1], alone)


def test_an_output_layer_that_trains_keeps_language_models_apart(
    options: Options, gpt2: Path, rows: Path, tmp_path: Path
) -> None:
    files = {n: str(rows / f"{f}-prompts.jsonl") for n, f in (("data", "train"), ("eval", "dev"))}
    more = {"model": str(gpt2), **files, "head": "train"}
    with pytest.raises(Apart, match="'lm_head' trains, and the output layer"):
        fit_together([options(tmp_path / f"{r}", r=r, **more) for r in (1, 2)], nothing)
    assert not list(tmp_path.iterdir())  # so that each can be begun alone


def test_a_run_that_had_taken_its_last_step_takes_no_other(
    options: Options, tmp_path: Path
) -> None:
    pair = [options(tmp_path / f"run{r}", r=r, save_minutes=0) for r in (1, 2)]
    with pytest.raises(Interrupted):
        fit_together(pair, nothing, reporter=Stopping(5, signal.SIGTERM))
    ended: list[str] = []
    fit_together(pair, lambda config, _: ended.append(config.out), resume=[c.out for c in pair])
    assert ended == [config.out for config in pair]
    for config in pair:
        told = json.loads((Path(config.out) / "manifest.json").read_text())
        assert (told["status"], told["steps"]) == ("finished", 6)


class Spoiling(Stopping):
    """Puts a file where a run is to save its adapter, when the run before it has saved its own."""

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith("run0: epoch"):
            (self.folder / "adapter").write_text("in the way")


def test_one_that_fails_is_told_of_and_the_others_can_go_on(
    options: Options, rows: Path, tmp_path: Path
) -> None:
    together = grid(options, tmp_path / "together", rows, epochs=2)
    spoiling = Spoiling(0, 0)
    spoiling.folder = Path(together[1].out)
    with pytest.raises(Exception, match=r"run1.*adapter"):
        fit_together(together, nothing, reporter=spoiling)
    told = [json.loads((Path(c.out) / "manifest.json").read_text()) for c in together]
    assert [m["status"] for m in told] == ["interrupted", "failed", "interrupted"]
    assert "adapter" in told[1]["reason"]
    alone = grid(options, tmp_path / "apart", rows, epochs=2)
    for i in (0, 2):  # one by one this time
        fit(together[i], resume=True)
        fit(alone[i])
        same(together[i], alone[i])
