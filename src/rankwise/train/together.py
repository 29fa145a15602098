"""fit_together: several runs on the same batches, with one pass of the frozen base for all."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import RankwiseError, UserError
from rankwise.train import checkpoint
from rankwise.train.bank import Apart, Bank, tree
from rankwise.train.config import FitConfig
from rankwise.train.frozen import Kernels
from rankwise.train.loop import Diverged, Loop
from rankwise.train.precision import cast_frozen
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.run import Common, FitResult, Run, begin, earlier, fit, load_common
from rankwise.train.setup import Data, Prepared, adapt, number_format
from rankwise.train.signals import Interrupted, StopRequest

__all__ = ["Apart", "Ended", "fit_together", "likeness"]

Ended = Callable[[FitConfig, FitResult | Diverged], None]

# What may differ from run to run: it changes neither the batches nor how the base computes.
_OWN = {
    *("r", "alpha", "rank_pattern", "alpha_pattern", "rank_stabilized", "freeze_a", "dora"),
    *("lr", "head_lr", "lora_plus", "weight_decay", "warmup", "max_grad_norm", "max_skipped"),
    *("out", "select", "eval_every", "save_minutes", "keep_checkpoints"),
}


def likeness(config: FitConfig) -> str | None:
    """What runs must have in common to train together; None for a run that trains by itself.

    It is their rows, batches and seed, where they adapt the model, and how it computes. Nothing may
    draw random numbers in a step, as each run is to be the one that it is alone: no dropout. Left
    out are also runs whose base trains or whose steps change the model.
    """
    alone = (
        config.method == "full"
        or config.base_drops
        or config.dropout > 0
        or config.cache > 0
        or config.train_nested
        or config.tied
        or config.gradient_checkpointing
        or config.init in ("eva", "lora-ga")
    )
    if alone:
        return None
    return json.dumps(config.model_dump(mode="json", exclude=_OWN), sort_keys=True)


def fit_together(
    configs: Sequence[FitConfig],
    ended: Ended,
    *,
    resume: Collection[str] = (),
    reporter: Reporter | None = None,
    data: Data | None = None,
) -> None:
    """Train runs of one :func:`likeness`, or any one; each leaves the folder that it leaves alone.

    In each step every run has the same rows of text. They go through the frozen base once, as one
    batch that holds them once for each run, and each part of it through that run's adapter
    (:func:`rankwise.using_rows`). The gradients, the optimiser, evaluations and checkpoints are
    each run's own, so that a run learns what it learns alone, up to rounding.

    Memory: the tensors of the base are there once; the activations of a step, and what trains, once
    for each run. Where a step does not fit, fewer runs share a pass. A manifest says how many runs
    were ``together``; its time is then the run's share, and its memory is not told.

    Args:
        configs: of the runs.
        ended: called with each run that is finished or has diverged.
        resume: folders of the runs that are gone on with.
        reporter: told what happens; the steps are those that each run takes.
        data: examples that are in memory already; read from the configs' files when None.

    Raises:
        Apart: the model cannot be trained so; nothing has been trained.
        UserError, ArtifactError, EnvironmentFault: each says what is wrong and how to mend it.
        Interrupted: a signal asked to stop; the runs can be resumed.
    """
    watcher = reporter or Silent()
    likenesses = {likeness(config) for config in configs}
    if len(configs) > 1 and (len(likenesses) > 1 or None in likenesses):
        raise UserError("Runs train together where all but their ranks and rates is the same.")
    going_on = configs[0].out in resume
    if len(configs) == 1:
        try:
            made = fit(configs[0], resume=going_on, reporter=watcher, data=data)
        except Diverged as error:
            made = error
        ended(configs[0], made)
        return
    common = load_common(configs[0], resume=going_on, reporter=watcher, data=data)
    named = {f"run{number}": config for number, config in enumerate(configs)}
    bank, made = _models(common, named, resume, watcher)
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(contextlib.ExitStack()) for name in named}
        runs: dict[str, Run] = {}
        for name, config in named.items():
            context = begin(
                config,
                common,
                functools.partial(_ready, made[name]),
                _Named(config, watcher),
                resume=config.out in resume,
                together=len(configs),
            )
            runs[name] = opened[name].enter_context(context)
        _Course(runs, opened, ended).run(bank, watcher)


def _models(
    common: Common, configs: Mapping[str, FitConfig], resume: Collection[str], watcher: Reporter
) -> tuple[Bank, dict[str, Prepared]]:
    """The bank, and the model of each run: as it is alone at its start, on tensors they share.

    All are attached to the base as it was loaded before any of them casts or moves its tensors.
    """
    device, base = common.device, common.base
    found = (earlier(Path(c.out), c.out in resume, device) for c in configs.values())
    begun = [manifest for manifest in found if manifest is not None]
    before = begun[0] if begun else None
    if len({manifest["hardware"]["dtype"] for manifest in begun}) > 1:
        raise Apart("They were begun in different number formats.")
    if any(Kernels.of(one) != Kernels.of(begun[0]) for one in begun):
        raise Apart("They were begun with different kernels.")
    generators = checkpoint.capture_rng(device)
    models: dict[str, Any] = {}
    for name, config in configs.items():
        checkpoint.restore_rng(generators, device)
        models[name] = tree(base.model)
        adapt(config, replace(base, model=models[name]), _Named(config, watcher))
    first = next(iter(configs.values()))
    choice = number_format(first, base.model, device, before)
    for model in models.values():
        if choice.dtype != torch.float32:
            cast_frozen(model, choice.dtype)
        model.to(device)
    watcher.note(f"Base in {choice.name} on {device.type} ({choice.reason}).")
    bank = Bank(tree(base.model), models, first, common.train, watcher, before)
    return bank, {name: Prepared(model, choice, bank.kernels) for name, model in models.items()}


def _ready(made: Prepared, before: Mapping[str, Any] | None) -> Prepared:
    del before
    return made


def _of(loop: Loop, error: Exception) -> Exception:
    """The error, naming its run among several."""
    if not isinstance(error, RankwiseError):
        return error
    told = type(error)(f"{loop.folder.name}: {error}")
    told.__cause__ = error
    return told


class _Named(Silent):
    """Hands on what a run notes, with its name; its steps are those of all."""

    def __init__(self, config: FitConfig, watcher: Reporter) -> None:
        self._name, self._watcher = Path(config.out).name, watcher

    def note(self, text: str) -> None:
        self._watcher.note(f"{self._name}: {text}")


class _Course:
    """The steps of several runs; those that are behind, as after a crash, catch up first."""

    def __init__(
        self, runs: Mapping[str, Run], opened: Mapping[str, contextlib.ExitStack], ended: Ended
    ) -> None:
        self.runs, self.opened, self.ended = runs, opened, ended
        self.left = {name: run.loop for name, run in runs.items()}

    def run(self, bank: Bank, watcher: Reporter) -> None:
        """Take all that are left."""
        total = max(loop.total for loop in self.left.values())
        watcher.start("training", total, min(loop.progress.step for loop in self.left.values()))
        try:
            with StopRequest(watcher.note) as stop:
                for name in [name for name, loop in self.left.items() if loop.done]:
                    self._finish(name)
                while self.left:
                    losses = self._step(bank, stop)
                    finite = [loss for loss in losses.values() if math.isfinite(loss)]
                    shown = {"loss": sum(finite) / len(finite)} if finite else {}
                    done = min((loop.progress.step for loop in self.left.values()), default=total)
                    watcher.advance(done, shown)
        finally:
            watcher.finish()

    def _step(self, bank: Bank, stop: StopRequest) -> dict[str, float]:
        """One step of those that are furthest behind; the others are saved if one of them fails."""
        step = min(loop.progress.step for loop in self.left.values())
        now = {name: loop for name, loop in self.left.items() if loop.progress.step == step}
        began = time.perf_counter()
        losses = bank.backward(now)
        share = (time.perf_counter() - began) / len(now)
        number = stop.number
        stopped: Interrupted | None = None
        failed: Exception | None = None
        for name, loop in now.items():
            try:
                loop.advance(losses[name], share)
                loop.settle(number)
                if loop.done:
                    self._finish(name)
            except Diverged as error:
                self._close(name, error)
                self.ended(loop.config, error)
            except Interrupted as error:  # the others are to save as well
                stopped = error
            except Exception as error:  # noqa: BLE001 (raised below, when the others are saved)
                if name in self.left:
                    self._close(name, error)
                failed = _of(loop, error)
        if failed is not None:
            for name, loop in list(self.left.items()):
                loop.save()
                self._close(name, Interrupted(signal.SIGTERM, str(loop.folder)))
            raise failed
        if stopped is not None:
            raise stopped
        return losses

    def _finish(self, name: str) -> None:
        """Write what a run has learned; nothing that follows is told in its folder."""
        result = self.runs[name].finish()
        del self.left[name]
        self.opened[name].close()
        self.ended(self.runs[name].config, result)

    def _close(self, name: str, error: Exception) -> None:
        """Let the folder of a run tell how it ended."""
        del self.left[name]
        with contextlib.suppress(type(error)), self.opened[name]:
            raise error
