"""advise: train a probe, cut it, try the cuts on tuning rows, and say what rank is enough."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from rankwise.errors import UserError
from rankwise.io import files
from rankwise.io.adapters import save_adapter
from rankwise.io.portable import Portable
from rankwise.lab.advising.choosing import Judge, search
from rankwise.lab.advising.options import Advise
from rankwise.lab.advising.page import reasons, write_advice
from rankwise.lab.advising.records import Advice
from rankwise.lab.inspecting.measuring import evidence
from rankwise.lab.page import can_make_pages
from rankwise.methods.adapter import Adapter, adapter_of
from rankwise.methods.trimming import cut_to, layers_of
from rankwise.train.answers import read_answers, write_answers
from rankwise.train.config import FitConfig, dump_config
from rankwise.train.manifest import read_manifest
from rankwise.train.reporter import Reporter
from rankwise.train.restore import restore
from rankwise.train.run import fit
from rankwise.train.trying import Bench, Quality, bench_of_tuning

__all__ = ["CONFIG", "TRIMMED", "advise"]

CONFIG, TRIMMED = "config.yaml", "adapter"


def advise(options: Advise, reporter: Reporter) -> Advice:
    """Train a probe of a generous rank, and find the smallest cut of it that is as good.

    The folder gets ``probe/`` (the run), ``trials/`` (what each cut answered), ``advice.json``,
    ``report.html``, ``config.yaml`` (the advised run, for ``rankwise fit --config``) and
    ``adapter/`` (the probe cut to the advised ranks, ready for use). Stopped, it goes on where it
    was.

    Raises:
        UserError: the options make no sense, the probe learned nothing, or the folder holds an
            advice of other options.
        ArtifactError, EnvironmentFault: as of training.
        Interrupted: a signal asked to stop; the same command goes on.
    """
    can_make_pages()
    config = options.probe()
    trials_of_it = options.out / "trials"
    _ensure(config, trials_of_it, reporter)
    restored = restore(config.out)
    whole = adapter_of(restored.base.model)
    bench = bench_of_tuning(restored, reporter)
    manifest = read_manifest(config.out)
    trials = _Trials(trials_of_it, bench, manifest["data"]["eval"]["fingerprint"], reporter)
    probe, silent = trials.tried("probe", whole), trials.tried("silent", silenced(whole))
    judge = Judge(bench.metric, probe, silent)
    layers = layers_of(whole)

    def cut(ranks: Mapping[str, int]) -> Quality:
        return trials.tried(_named(ranks), cut_to(whole, ranks))

    found = tuple(search(layers, config.r, judge, cut))
    gaps = sorted(g.k for layer in layers.values() if (g := layer.spectrum.gap) is not None)
    advice = Advice(
        out=str(options.out),
        metric=bench.metric,
        rows=len(bench.rows.encoded),
        probe_r=config.r,
        probe_parameters=sum(f.count() for f in whole.factors.values()),
        probe_score=probe.metrics[bench.metric],
        silent_score=silent.metrics[bench.metric],
        gained=judge.gained,
        gap=tuple(gaps),
        trials=found,
    )
    _write(options, advice, whole, bench)
    return advice


def silenced(adapter: Adapter) -> Adapter:
    """The adapter with updates of zero, so that its head and biases act alone."""
    ones = cut_to(adapter, dict.fromkeys(adapter.factors, 1))
    zero = {n: replace(f, B=torch.zeros_like(f.B)) for n, f in ones.factors.items()}
    return replace(ones, factors=zero)


class _Trials:
    """Adapters tried on the tuning rows, each once: what it answered is kept in a folder."""

    def __init__(self, folder: Path, bench: Bench, rows: str, reporter: Reporter) -> None:
        self.folder, self.bench, self.rows, self.reporter = folder, bench, rows, reporter

    def tried(self, name: str, adapter: Adapter) -> Quality:
        answers, scores = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        if scores.exists() and answers.exists():
            metrics = json.loads(scores.read_text(encoding="utf-8"))
            return Quality(metrics, read_answers(answers, self.rows))
        (found,) = self.bench.tried([adapter], self.reporter)
        size = sum(f.count() for f in adapter.factors.values())
        score = found.metrics[self.bench.metric]
        self.reporter.note(f"{name}: {size:,} parameters, {self.bench.metric} {score:.4f}")
        write_answers(answers, found.answers, self.rows)
        files.write_json(scores, dict(found.metrics))
        return Quality(found.metrics, read_answers(answers, self.rows))


def _named(ranks: Mapping[str, int]) -> str:
    """A file name for a choice of ranks."""
    text = json.dumps(dict(ranks), sort_keys=True)
    return f"cut-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _ensure(config: FitConfig, trials: Path, reporter: Reporter) -> None:
    """Train the probe, go on with it, or find it done with its trials."""
    folder = Path(config.out)
    if not (folder / "manifest.json").exists():
        shutil.rmtree(trials, ignore_errors=True)  # another probe's
        reporter.note(f"probe: r = {config.r}, α = {config.alpha:g}")
        fit(config, reporter=reporter)
        return
    manifest = read_manifest(folder)
    if manifest["config"] != config.model_dump(mode="json"):
        raise UserError(
            f"'{folder}' holds a probe of other options. Name another --out, or delete it."
        )
    if manifest["status"] != "finished":
        fit(config, resume=True, reporter=reporter)
        return
    reporter.note("the probe was trained before")


def _write(options: Advise, advice: Advice, whole: Adapter, bench: Bench) -> None:
    """The page, the advised configuration and the cut adapter."""
    chosen = advice.chosen
    ranks = dict.fromkeys(whole.factors, advice.probe_r) if chosen is None else chosen.ranks
    head = "".join(f"# {sentence}\n" for sentence in reasons(advice))
    files.write_text(options.out / CONFIG, head + dump_config(options.advised(ranks)))
    if chosen is not None:
        cut = cut_to(whole, chosen.ranks)
        save_adapter(bench.base.model, options.out / TRIMMED, adapter=cut)
    write_advice(advice, tuple(evidence(Portable(whole))), options.out)
