"""An advice from end to end on a tiny model: its folder, going on after a stop, and its config."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rankwise.errors import UserError
from rankwise.io.peft_alone import read_peft_alone
from rankwise.lab.advising import CONFIG, RECORDS, REPORT, TRIMMED, Advice, Advise, advise, summary
from rankwise.lab.advising.options import without_rank
from rankwise.lab.advising.running import _Desk, _write, silenced
from rankwise.train.config import make_config
from rankwise.train.config_file import read_config
from rankwise.train.reporter import Silent
from rankwise.train.signals import Interrupted


@pytest.fixture(scope="module")
def options(
    bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Advise]:
    out = tmp_path_factory.mktemp("advice")

    def make(**more: Any) -> Advise:
        values: dict[str, Any] = {
            "model": str(bert),
            "data": str(rows / "train.tsv"),
            "eval": str(rows / "dev.tsv"),
            "out": str(out / "made"),
            "r": 4,
            "lr": 0.01,
            "epochs": 3,
            "batch_size": 8,
            "dtype": "float32",
            "device": "cpu",
        }
        return Advise(values | more)

    return make


@pytest.fixture(scope="module")
def made(options: Callable[..., Advise]) -> Advice:
    return advise(options(), Silent())


def test_the_folder_has_the_probe_the_trials_and_the_advice(made: Advice) -> None:
    out = Path(made.out)
    record = json.loads((out / RECORDS).read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(made.to_json()))
    assert {t.kind for t in made.trials} == {"one rank for all layers", "ranks by layer"}
    assert [t.size for t in made.trials][:2] == [1, 2]
    assert all(t.low <= t.lost <= t.high for t in made.trials)
    page = (out / REPORT).read_text(encoding="utf-8")
    assert "Quality against size" in page
    assert "http://" not in page
    assert len(list((out / "trials-r4").glob("*.json"))) >= len({str(t.ranks) for t in made.trials})


def test_the_evaluation_rows_chose_nothing(made: Advice) -> None:
    probe = yaml.safe_load((Path(made.out) / "probe-r4" / "config.yaml").read_text())
    assert probe["eval"] is None
    assert probe["select"] == "last"
    assert made.rows == round(48 * 0.2)


def test_where_nothing_is_gained_nothing_is_advised(made: Advice, rows: Path) -> None:
    out = Path(made.out)
    assert not made.gained  # ten rows tell little
    assert made.chosen is None
    assert not (out / TRIMMED).exists()
    config = make_config(read_config(str(out / CONFIG)), "test")
    assert (config.r, config.alpha, config.rank_pattern) == (4, 8, {})
    assert config.eval == str(rows / "dev.tsv")
    assert config.out == str(out / "advised")
    assert "# No rank is advised" in (out / CONFIG).read_text(encoding="utf-8")


def test_the_config_has_the_ranks_and_the_adapter_is_the_cut(
    made: Advice, options: Callable[..., Advise], tmp_path: Path
) -> None:
    advice = replace(made, gained=True, out=str(tmp_path))
    chosen = advice.chosen
    assert chosen is not None
    desk = _Desk(options(), Silent())
    desk.opened(4)
    _write(options(out=str(tmp_path)), advice, desk)
    config = make_config(read_config(str(tmp_path / CONFIG)), "test")
    kept = {n: k for n, k in chosen.ranks.items() if k}
    assert {n: config.rank_pattern.get(n, config.r) for n in kept} == kept
    cut = read_peft_alone(tmp_path / TRIMMED)
    assert {n: f.r for n, f in cut.factors.items()} == kept
    text = (tmp_path / CONFIG).read_text(encoding="utf-8")
    assert all(f"# {sentence}" in text for sentence in summary(advice))


def test_the_same_command_again_trains_and_tries_nothing(
    made: Advice, options: Callable[..., Advise]
) -> None:
    out = Path(made.out)
    before = {p: p.stat().st_mtime_ns for p in (out / "probe-r4").rglob("*")}
    trials = {p: p.stat().st_mtime_ns for p in (out / "trials-r4").iterdir()}
    assert advise(options(), Silent()) == made
    assert {p: p.stat().st_mtime_ns for p in (out / "probe-r4").rglob("*")} == before
    assert {p: p.stat().st_mtime_ns for p in (out / "trials-r4").iterdir()} == trials


def test_a_signal_stops_between_two_trials_and_the_same_command_goes_on(
    made: Advice, options: Callable[..., Advise], tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    shutil.copytree(made.out, out)
    for trial in (out / "trials-r4").glob("cut-*"):
        trial.unlink()

    class Signals(Silent):
        def note(self, text: str) -> None:
            if text.startswith("cut-"):
                os.kill(os.getpid(), signal.SIGTERM)

    options_there = options(out=str(out))
    probe = out / "probe-r4" / "manifest.json"
    text = probe.read_text(encoding="utf-8")
    probe.write_text(text.replace(made.out, str(out)), encoding="utf-8")
    with pytest.raises(Interrupted, match="Go on with: the same command") as stopped:
        advise(options_there, Signals())
    assert stopped.value.number == signal.SIGTERM
    assert len(list((out / "trials-r4").glob("cut-*.json"))) == 1
    assert replace(advise(options_there, Silent()), out="") == replace(made, out="")


def test_other_options_are_another_advice(made: Advice, options: Callable[..., Advise]) -> None:
    with pytest.raises(UserError, match=r"probe-r4' is a probe of other options \(lr\)"):
        advise(options(lr=0.02), Silent())
    with pytest.raises(UserError, match=r"probe-r4' is a probe of other options \(alpha\)"):
        advise(options(r=8, alpha=8), Silent())


def test_ranks_by_layer_keep_the_scale_of_the_probe(options: Callable[..., Advise]) -> None:
    names = [f"encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]
    ranks = dict(zip(names, (2, 2, 5, 0), strict=True))
    asked = options(alpha=12, exclude_modules=["pooler"])
    config = asked.advised(asked.probe(4), ranks)
    assert (config.r, config.alpha) == (2, 6)
    assert config.rank_pattern == {names[2]: 5}
    assert config.alpha_pattern == {names[2]: 15}
    assert config.exclude_modules == ["pooler", names[3]]


def test_ranks_by_layer_keep_the_scale_of_a_rank_stabilized_probe(
    options: Callable[..., Advise],
) -> None:
    asked = options(r=16, alpha=8, rank_stabilized=True)
    config = asked.advised(asked.probe(16), {"a": 4, "b": 4, "c": 9})
    assert 8 / 16**0.5 == 2
    assert (config.r, config.alpha) == (4, 4)  # 4 / √4
    assert config.alpha_pattern == {"c": 6}  # 6 / √9


def test_another_probe_has_trials_of_its_own(
    made: Advice, options: Callable[..., Advise], tmp_path: Path
) -> None:
    out = tmp_path / "again"
    shutil.copytree(made.out, out)
    shutil.rmtree(out / "probe-r4")
    other = advise(options(out=str(out), lr=0.001, epochs=1), Silent())
    alone = advise(options(out=str(tmp_path / "alone"), lr=0.001, epochs=1), Silent())
    assert replace(other, out="") == replace(alone, out="")
    assert other.probe_score != made.probe_score or other.trials != made.trials


def test_without_a_rank_there_are_larger_probes_of_the_same_scale(
    options: Callable[..., Advise],
) -> None:
    asked = Advise(without_rank(options(r=16, alpha=64).given))
    assert asked.ranks == (8, 16, 32, 64)
    assert [asked.probe(r).alpha for r in asked.ranks] == [32, 64, 128, 256]
    assert Path(asked.probe(16).out).name == "probe-r16"
    stable = Advise(without_rank(options(r=32, alpha=4, rank_stabilized=True).given))
    assert [stable.probe(r).alpha for r in (8, 32)] == [2, 4]  # s = α/√r
    plain = Advise(without_rank(options().given))
    assert [plain.probe(r).alpha for r in plain.ranks] == [16, 32, 64, 128]
    assert options().ranks == (4,)


def test_what_is_no_question_of_rank_is_refused(options: Callable[..., Advise]) -> None:
    with pytest.raises(UserError, match="leave --method out"):
        options(method="full").probe(4)
    with pytest.raises(UserError, match="leave rank_pattern"):
        options(rank_pattern={"query": 2}).probe(4)


def test_a_silenced_adapter_adds_nothing(made: Advice) -> None:
    adapter = read_peft_alone(Path(made.out) / "probe-r4" / "adapter").adapter
    quiet = silenced(adapter)
    assert quiet.factors.keys() == adapter.factors.keys()
    assert all(not torch.any(f.delta()) for f in quiet.factors.values())
    assert quiet.trained.keys() == adapter.trained.keys()
