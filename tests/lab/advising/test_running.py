"""An advice from end to end on a tiny model: its folder, going on after a stop, and its config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rankwise.errors import UserError
from rankwise.io.peft_alone import read_peft_alone
from rankwise.lab.advising import CONFIG, RECORDS, REPORT, TRIMMED, Advice, Advise, advise, summary
from rankwise.lab.advising.options import PROBE_R
from rankwise.lab.advising.running import silenced
from rankwise.train.config import make_config, read_config
from rankwise.train.reporter import Silent


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
    assert len(list((out / "trials").glob("*.json"))) >= len({str(t.ranks) for t in made.trials})


def test_the_evaluation_rows_chose_nothing(made: Advice) -> None:
    probe = yaml.safe_load((Path(made.out) / "probe" / "config.yaml").read_text())
    assert probe["eval"] is None
    assert probe["select"] == "last"
    assert made.rows == round(48 * 0.2)


def test_the_config_is_the_runs_own_and_the_adapter_is_the_cut(
    made: Advice, options: Callable[..., Advise], rows: Path
) -> None:
    values = read_config(str(Path(made.out) / CONFIG))
    config = make_config(values, "test")
    chosen = made.chosen
    assert chosen is not None
    assert config.eval == str(rows / "dev.tsv")
    assert config.out == str(Path(made.out) / "advised")
    cut = read_peft_alone(Path(made.out) / TRIMMED)
    assert {n: f.r for n, f in cut.factors.items()} == {n: k for n, k in chosen.ranks.items() if k}
    text = (Path(made.out) / CONFIG).read_text(encoding="utf-8")
    assert all(f"# {sentence}" in text for sentence in summary(made))


def test_the_same_command_again_trains_and_tries_nothing(
    made: Advice, options: Callable[..., Advise]
) -> None:
    out = Path(made.out)
    before = {p: p.stat().st_mtime_ns for p in (out / "probe").rglob("*")}
    trials = {p: p.stat().st_mtime_ns for p in (out / "trials").iterdir()}
    assert advise(options(), Silent()) == made
    assert {p: p.stat().st_mtime_ns for p in (out / "probe").rglob("*")} == before
    assert {p: p.stat().st_mtime_ns for p in (out / "trials").iterdir()} == trials


def test_other_options_are_another_advice(made: Advice, options: Callable[..., Advise]) -> None:
    with pytest.raises(UserError, match="holds a probe of other options"):
        advise(options(lr=0.02), Silent())


def test_ranks_by_layer_keep_the_scale_of_the_probe(options: Callable[..., Advise]) -> None:
    names = [f"encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]
    ranks = dict(zip(names, (2, 2, 5, 0), strict=True))
    config = options(alpha=12, exclude_modules=["pooler"]).advised(ranks)
    assert (config.r, config.alpha) == (2, 6)
    assert config.rank_pattern == {names[2]: 5}
    assert config.alpha_pattern == {names[2]: 15}
    assert config.exclude_modules == ["pooler", names[3]]


def test_what_is_no_question_of_rank_is_refused(options: Callable[..., Advise]) -> None:
    assert Advise({}).r == PROBE_R
    with pytest.raises(UserError, match="leave --method out"):
        options(method="full").probe()
    with pytest.raises(UserError, match="leave rank_pattern"):
        options(rank_pattern={"query": 2}).probe()


def test_a_silenced_adapter_adds_nothing(made: Advice) -> None:
    adapter = read_peft_alone(Path(made.out) / "probe" / "adapter").adapter
    quiet = silenced(adapter)
    assert quiet.factors.keys() == adapter.factors.keys()
    assert all(not torch.any(f.delta()) for f in quiet.factors.values())
    assert quiet.trained.keys() == adapter.trained.keys()
