"""What is trained and measured: the runs of a comparison, and what is put beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.errors import UserError
from rankwise.io import files
from rankwise.lab.advising import CONFIG, Advise, advise, without_rank
from rankwise.lab.compare.evidence import outcomes_of
from rankwise.lab.compare.folder import Pinned, begin, find_rows, read_pinned
from rankwise.lab.compare.rows import rows_file
from rankwise.lab.compare.work import work_of
from rankwise.lab.compare.worker import thin_log
from rankwise.lab.records import RunRecord, read_run
from rankwise.lab.run_files import EVENTS, MANIFEST
from rankwise.lab.settings import Setting
from rankwise.methods.adapter import Adapter, adapter_of
from rankwise.methods.trimming import Prefix, cut_to, trim
from rankwise.train.answers import read_answers, write_answers
from rankwise.train.config import FitConfig, make_config
from rankwise.train.config_file import read_config
from rankwise.train.manifest import read_manifest
from rankwise.train.reporter import Reporter
from rankwise.train.restore import restore
from rankwise.train.run import fit
from rankwise.train.trying import bench_of_run

Cuts = Mapping[Path, Callable[[Adapter], Adapter]]


@dataclass(frozen=True)
class Study:
    """The LoRA runs of a comparison, and the folder of what is put beside them.

    Attributes:
        pinned: the comparison.
        out: where the rest goes.
        apart: the runs of each rank, over the seeds under which every rank is finished.
        largest: the options of the runs of the largest rank, by seed.
    """

    pinned: Pinned
    out: Path
    apart: Mapping[int, Setting]
    largest: Mapping[int, FitConfig]


RESULTS, RANKS = "results", "ranks"


def read_study(
    experiment: Path, rows: Mapping[str, str], reporter: Reporter, results: str = RESULTS
) -> Study:
    """The comparison in an experiment's folder, as far as it is finished.

    Args:
        experiment: the folder.
        rows: the files of the rows ("data", "eval") where they have moved.
        reporter: told what reading the rows has to say.
        results: the comparison's folder in it, results or results-WHAT; the rest goes to ranks or
            ranks-WHAT.
    """
    if not results.startswith(RESULTS):
        raise UserError(f"--results must begin with '{RESULTS}', got '{results}'.")
    pinned = read_pinned(experiment / results)
    if rows:
        pinned = begin(pinned.folder, rows, {}, reporter)
    grid, ratio = pinned.grid, pinned.config.alpha_ratio
    outcomes = outcomes_of(grid, pinned.metric)
    cells = {
        (cell.config.r, cell.config.seed): cell
        for cell in work_of(grid, outcomes, pinned.metric).cells
        if cell.name.startswith("runs/lora-") and cell.config.alpha == ratio * cell.config.r
    }
    done = {
        key: found
        for key, cell in cells.items()
        if cell.name in outcomes and (found := read_run(grid.folder / cell.name)).usable
    }
    ranks, seeds = pinned.config.ranks, range(pinned.config.seeds)
    whole = [seed for seed in seeds if all((r, seed) in done for r in ranks)]
    if not whole:
        raise UserError(
            f"'{pinned.folder}' has no seed under which LoRA is finished at every rank. Go on "
            f"with: rankwise compare --out {pinned.folder}"
        )
    apart = {r: Setting(f"r = {r}", tuple(done[r, seed] for seed in whole)) for r in ranks}
    return Study(
        pinned,
        experiment / f"{RANKS}{results.removeprefix(RESULTS)}",
        apart,
        {seed: cells[max(ranks), seed].config for seed in whole},
    )


def nested(study: Study, seed: int, reporter: Reporter) -> dict[int, RunRecord]:
    """One nested run of the largest rank, cut to the first k of its ranks for each k."""
    config = study.largest[seed]
    out = study.out / f"nested-r{config.r}-seed{seed}"
    places = {k: study.out / "cuts" / f"{out.name}-first{k}" for k in study.apart}
    if not all(map(_measured, places.values())):
        _train(study, config.model_copy(update={"train_nested": True, "out": str(out)}), reporter)
        _measure(study, out, {p: _first(k) for k, p in places.items()}, reporter)
    return {k: _read_cut(study, out, place) for k, place in places.items()}


def advised(study: Study, seed: int, reporter: Reporter) -> tuple[RunRecord, RunRecord]:
    """What follows from an advice: its probe cut to the advised ranks, and the run it advises.

    The probe learns from a part of the training rows and its cuts are judged on the rest, so that
    the evaluation rows choose nothing. The run it advises learns from all of them.
    """
    out = study.out / f"advice-seed{seed}"
    place = study.out / "cuts" / out.name
    if not _measured(place):
        find_rows(study.pinned)
        options = study.largest[seed].model_dump(mode="json", exclude_unset=True)
        advice = advise(Advise(without_rank({**options, "out": str(out)})), reporter)
        probe, chosen = out / f"probe-r{advice.probe_r}", advice.chosen
        _measure(study, probe, {place: _to(chosen and chosen.ranks)}, reporter)
        for folder in out.glob("probe-r*"):
            _tidy(folder)
    again = make_config(read_config(str(out / CONFIG)), f"The options in '{out / CONFIG}'")
    probe = study.out / _read(place)["run"]
    return _read_cut(study, probe, place), read_run(_train(study, again, reporter))


def _first(k: int) -> Callable[[Adapter], Adapter]:
    return lambda whole: trim(whole, Prefix(k)).adapter


def _to(ranks: Mapping[str, int] | None) -> Callable[[Adapter], Adapter]:
    """The cut to these ranks; where nothing less than the probe was enough, the probe."""
    return lambda whole: whole if ranks is None else cut_to(whole, ranks)


def _train(study: Study, config: FitConfig, reporter: Reporter) -> Path:
    """The folder of a run that is trained now, gone on with, or found finished."""
    folder = Path(config.out)
    begun = (folder / MANIFEST).exists()
    if not begun or read_manifest(folder)["status"] != "finished":
        find_rows(study.pinned)
        reporter.note(f"{folder.relative_to(study.out)}:")
        fit(config, resume=begun, reporter=reporter)
        _tidy(folder)
    return folder


def _tidy(folder: Path) -> None:
    """Leave of a finished run what a comparison leaves of its own."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    thin_log(folder / EVENTS)


def _measured(place: Path) -> bool:
    return place.with_suffix(".json").exists()


def _read(place: Path) -> dict[str, Any]:
    return json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))


def _measure(study: Study, run: Path, cuts: Cuts, reporter: Reporter) -> None:
    """Let what is cut from a run answer the evaluation rows, and keep the answers."""
    find_rows(study.pinned)
    whole = adapter_of(restore(run).base.model)
    rows = rows_file(study.pinned.folder, "eval")
    bench = bench_of_run(str(run), str(rows), reporter=reporter)
    made = {place: cut(whole) for place, cut in cuts.items()}
    qualities = bench.tried(made.values(), reporter)
    for (place, adapter), quality in zip(made.items(), qualities, strict=True):
        evaluation = study.pinned.parts["eval"].fingerprint
        write_answers(place.with_suffix(".safetensors"), quality.answers, evaluation)
        record = {
            "run": str(run.relative_to(study.out)),
            "ranks": dict.fromkeys(whole.factors, 0) | {n: f.r for n, f in adapter.factors.items()},
            "parameters": sum(f.count() for f in adapter.factors.values()),
            "metrics": quality.metrics,
        }
        files.write_json(place.with_suffix(".json"), record)


def _read_cut(study: Study, run: Path, place: Path) -> RunRecord:
    """The record of a run with its cut in the place of its adapter."""
    whole, cut = read_run(run), _read(place)
    evaluation = study.pinned.parts["eval"].fingerprint
    less = whole.counts.adapter - cut["parameters"]
    return replace(
        whole,
        method={**whole.method, "ranks": cut["ranks"]},
        counts=replace(
            whole.counts, adapter=cut["parameters"], trainable=whole.counts.trainable - less
        ),
        metrics=cut["metrics"],
        answers=read_answers(place.with_suffix(".safetensors"), evaluation),
    )
