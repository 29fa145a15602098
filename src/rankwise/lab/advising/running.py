"""advise: train a probe, cut it, try the cuts on tuning rows, and say what rank is enough."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from rankwise.errors import UserError
from rankwise.io import files
from rankwise.io.adapters import save_adapter
from rankwise.io.portable import Portable
from rankwise.lab.advising.choosing import Judge, Probe, grown, search
from rankwise.lab.advising.options import Advise
from rankwise.lab.advising.page import reasons, write_advice
from rankwise.lab.advising.records import Advice, Trial
from rankwise.lab.inspecting.measuring import evidence
from rankwise.lab.page import can_make_pages
from rankwise.methods.adapter import Adapter, adapter_of
from rankwise.methods.trimming import cut_to, layers_of
from rankwise.train.answers import read_answers, write_answers
from rankwise.train.config import FitConfig
from rankwise.train.manifest import read_manifest
from rankwise.train.reporter import Reporter
from rankwise.train.restore import restore
from rankwise.train.run import fit
from rankwise.train.signals import Interrupted, StopRequest
from rankwise.train.trying import Bench, Quality, bench_of_tuning

__all__ = ["CONFIG", "TRIMMED", "advise"]

CONFIG, TRIMMED = "config.yaml", "adapter"
_AGAIN = "the same command; what was trained and tried is kept"


def advise(options: Advise, reporter: Reporter) -> Advice:
    """Train a probe, and find the smallest cut of it that is as good.

    Where half of its ranks are not enough, and no rank was given, a probe of twice its rank
    follows; the first stays if it is as good as the second. The folder gets ``probe-rR/`` (the
    run), ``trials-rR/`` (what each cut answered), ``advice.json``, ``report.html``, ``config.yaml``
    (the advised run, for ``rankwise fit --config``) and ``adapter/`` (the probe cut to the advised
    ranks, ready for use). Stopped, it goes on where it was.

    Raises:
        UserError: the options make no sense, the probe learned nothing, or the folder holds an
            advice of other options.
        ArtifactError, EnvironmentFault: as of training.
        Interrupted: a signal asked to stop; the same command goes on.
    """
    can_make_pages()
    _ensure_ours(options)
    desk = _Desk(options, reporter)
    try:
        found = grown(options.ranks, desk.opened, desk.searched)
    except Interrupted as stopped:  # in a training, which would name its own command
        raise Interrupted(stopped.number, _AGAIN) from stopped
    probe, judge = found.probe, found.probe.judge
    gaps = sorted(g.k for layer in probe.layers.values() if (g := layer.spectrum.gap) is not None)
    advice = Advice(
        out=str(options.out),
        metric=judge.metric,
        rows=len(judge.probe.answers.rows),
        steps=found.steps,
        probe_r=probe.r,
        probe_parameters=sum(f.count() for f in desk.adapters[probe.r].factors.values()),
        probe_score=judge.probe.metrics[judge.metric],
        silent_score=judge.silent.metrics[judge.metric],
        gained=judge.gained,
        gap=tuple(gaps),
        trials=found.trials,
    )
    _write(options, advice, desk)
    return advice


def silenced(adapter: Adapter) -> Adapter:
    """The adapter with updates of zero, so that its head and biases act alone."""
    ones = cut_to(adapter, dict.fromkeys(adapter.factors, 1))
    zero = {n: replace(f, B=torch.zeros_like(f.B)) for n, f in ones.factors.items()}
    return replace(ones, factors=zero)


class _Desk:
    """Where probes are trained, and where they and their cuts are tried, each once.

    The answers are kept in a folder. One base is in memory at a time.

    Attributes:
        adapters: of the probes that were opened, by rank.
    """

    def __init__(self, options: Advise, reporter: Reporter) -> None:
        self.adapters: dict[int, Adapter] = {}
        self._options, self._reporter = options, reporter
        self._bench: Bench | None = None
        self._folder, self._rows = options.out, ""

    @property
    def bench(self) -> Bench:
        """The base, bare, and the tuning rows, of the probe that was opened last."""
        assert self._bench is not None, "open a probe first"
        return self._bench

    def opened(self, r: int) -> Probe:
        """The probe of rank r: trained, gone on with, or found done, and tried."""
        self._bench = None
        config = self._options.probe(r)
        self._folder = self._options.out / f"trials-r{r}"
        _ensure(config, self._folder, self._reporter)
        restored = restore(config.out)
        whole = self.adapters[r] = adapter_of(restored.base.model)
        self._bench = bench_of_tuning(restored, self._reporter)
        self._rows = read_manifest(config.out)["data"]["eval"]["fingerprint"]
        full, silent = self._tried("probe", whole), self._tried("silent", silenced(whole))
        return Probe(r, layers_of(whole), Judge(self.bench.metric, full, silent))

    def searched(self, probe: Probe) -> tuple[Trial, ...]:
        """Every cut of the probe that was opened last which the search tries."""
        whole = self.adapters[probe.r]

        def cut(ranks: Mapping[str, int]) -> Quality:
            return self._tried(_named(ranks), cut_to(whole, ranks))

        return tuple(search(probe.layers, probe.r, probe.judge, cut))

    def _tried(self, name: str, adapter: Adapter) -> Quality:
        answers, scores = self._folder / f"{name}.safetensors", self._folder / f"{name}.json"
        if scores.exists() and answers.exists():
            metrics = json.loads(scores.read_text(encoding="utf-8"))
            return Quality(metrics, read_answers(answers, self._rows))
        with StopRequest(self._reporter.note) as stop:
            (found,) = self.bench.tried([adapter], self._reporter)
            size = sum(f.count() for f in adapter.factors.values())
            score = found.metrics[self.bench.metric]
            self._reporter.note(f"{name}: {size:,} parameters, {self.bench.metric} {score:.4f}")
            write_answers(answers, found.answers, self._rows)
            files.write_json(scores, dict(found.metrics))
        if stop.number is not None:
            raise Interrupted(stop.number, _AGAIN)
        return Quality(found.metrics, read_answers(answers, self._rows))


def _named(ranks: Mapping[str, int]) -> str:
    """A file name for a choice of ranks."""
    text = json.dumps(dict(ranks), sort_keys=True)
    return f"cut-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _ensure_ours(options: Advise) -> None:
    """Refuse a folder that has a probe of other options than these, whatever its rank."""
    for place in sorted(options.out.glob("probe-r*/manifest.json")):
        config = read_manifest(place.parent)["config"]
        wanted = options.probe(config["r"]).model_dump(mode="json")
        if config != wanted:
            other = ", ".join(sorted(k for k in wanted if config.get(k) != wanted[k]))
            raise UserError(
                f"'{place.parent}' is a probe of other options ({other}). Name another --out, or "
                "delete the folder."
            )


def _ensure(config: FitConfig, trials: Path, reporter: Reporter) -> None:
    """Train the probe, go on with it, or find it done with its trials."""
    folder = Path(config.out)
    if not (folder / "manifest.json").exists():
        shutil.rmtree(trials, ignore_errors=True)  # another probe's
        reporter.note(f"probe: r = {config.r}, α = {config.alpha:g}")
        fit(config, reporter=reporter)
    elif read_manifest(folder)["status"] != "finished":
        fit(config, resume=True, reporter=reporter)
    else:
        reporter.note(f"the probe of r = {config.r} was trained before")


def _write(options: Advise, advice: Advice, desk: _Desk) -> None:
    """The page, the advised configuration and the cut adapter."""
    chosen, whole = advice.chosen, desk.adapters[advice.probe_r]
    ranks = dict.fromkeys(whole.factors, advice.probe_r) if chosen is None else chosen.ranks
    head = "".join(f"# {sentence}\n" for sentence in reasons(advice))
    config = options.advised(options.probe(advice.probe_r), ranks)
    values = config.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    files.write_text(options.out / CONFIG, head + text)
    if chosen is None:
        shutil.rmtree(options.out / TRIMMED, ignore_errors=True)  # of an advice before this one
    else:
        cut = cut_to(whole, chosen.ranks)
        save_adapter(desk.bench.base.model, options.out / TRIMMED, adapter=cut)
    write_advice(advice, tuple(evidence(Portable(whole))), options.out)
