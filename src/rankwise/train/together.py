"""fit_together: several runs on the same batches, with one pass of the frozen base for all."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from rankwise.attaching import Lent, attach, attachments, using_rows
from rankwise.errors import UserError
from rankwise.layers import Update
from rankwise.train import checkpoint
from rankwise.train.config import FitConfig
from rankwise.train.evaluate import Rows, part_losses
from rankwise.train.frozen import pack_frozen, recompute_frozen, train_mode
from rankwise.train.language import POSITIONS, see_output
from rankwise.train.loop import Diverged, Loop
from rankwise.train.precision import allocation_failed
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.run import Common, FitResult, Run, begin, fit, load_common
from rankwise.train.setup import Data
from rankwise.train.signals import Interrupted, StopRequest

__all__ = ["Apart", "Ended", "fit_together", "likeness"]


class Apart(UserError):
    """Runs cannot share the passes of their base; each can be trained by itself."""


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
    if len(configs) == 1:
        try:
            made = fit(configs[0], resume=configs[0].out in resume, reporter=watcher, data=data)
        except Diverged as error:
            made = error
        ended(configs[0], made)
        return
    going_on = configs[0].out in resume
    common = load_common(configs[0], resume=going_on, reporter=watcher, data=data)
    with contextlib.ExitStack() as stack:
        opened: dict[str, contextlib.ExitStack] = {}
        runs: dict[str, Run] = {}
        generators = checkpoint.capture_rng(common.device)
        for number, config in enumerate(configs):
            own = stack.enter_context(contextlib.ExitStack())
            base = replace(common.base, model=_tree(common.base.model))
            checkpoint.restore_rng(generators, common.device)
            context = begin(
                config,
                common,
                base,
                _Named(config, watcher),
                resume=config.out in resume,
                together=len(configs),
            )
            opened[f"run{number}"], runs[f"run{number}"] = own, own.enter_context(context)
        _train(common, runs, opened, ended, watcher)


class _Named(Silent):
    """Hands on what a run notes, with its name; its steps are those of all."""

    def __init__(self, config: FitConfig, watcher: Reporter) -> None:
        self._name, self._watcher = Path(config.out).name, watcher

    def note(self, text: str) -> None:
        self._watcher.note(f"{self._name}: {text}")


def _tree(model: Any) -> Any:
    """A model of the same tensors, whose modules are others."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _train(
    common: Common,
    runs: Mapping[str, Run],
    opened: Mapping[str, contextlib.ExitStack],
    ended: Ended,
    watcher: Reporter,
) -> None:
    """Take the steps of all runs; those that are behind, as after a crash, catch up first."""
    bank = _Bank(common, runs, watcher)
    loops = {name: run.loop for name, run in runs.items()}
    watcher.start("training", bank.total, min(loop.progress.step for loop in loops.values()))
    with _finishing(watcher), StopRequest(watcher.note) as stop:
        while loops:
            step = min(loop.progress.step for loop in loops.values())
            now = {name: loop for name, loop in loops.items() if loop.progress.step == step}
            began = time.perf_counter()
            losses = bank.backward(now)
            share = (time.perf_counter() - began) / len(now)
            number, stopped = stop.number, None
            for name, loop in now.items():
                try:
                    loop.advance(losses[name], share)
                    loop.settle(number)
                except Diverged as error:
                    with contextlib.suppress(Diverged), opened[name]:
                        raise
                    ended(loop.config, error)
                    del loops[name]
                except Interrupted as error:  # the others are to save as well
                    stopped = error
                else:
                    if loop.done:
                        ended(loop.config, runs[name].finish())
                        opened[name].close()
                        del loops[name]
            if stopped is not None:
                raise stopped
            finite = [loss for loss in losses.values() if math.isfinite(loss)]
            watcher.advance(step + 1, {"loss": sum(finite) / len(finite)} if finite else {})


@contextlib.contextmanager
def _finishing(watcher: Reporter) -> Generator[None]:
    try:
        yield
    finally:
        watcher.finish()


class _Bank:
    """One model with the adapters of all runs, through which their steps go."""

    def __init__(self, common: Common, runs: Mapping[str, Run], watcher: Reporter) -> None:
        first = next(iter(runs.values()))
        self.rows: Rows = common.train
        self.total = first.loop.total
        self.most = len(runs)  # that share a pass
        self.watcher = watcher
        self.model = _tree(common.base.model)
        for name, run in runs.items():
            attach(self.model, Lent(run.made.model), name=name)
        self.model.to(common.device)
        self._try()
        if first.config.recompute:
            recompute_frozen(self.model, watcher)
        if first.config.pack == "auto":
            size = first.config.batch_size * len(runs)
            packed = pack_frozen(self.model, self.rows.encoded.lengths, size, None, watcher)
            for run in runs.values():
                run.manifest["hardware"]["packed"] = list(packed)

    def _try(self) -> None:
        """Let a row of each run through.

        Raises:
            Apart: steps would draw random numbers, or rows cannot have adapters of their own.
        """
        train_mode(self.model, base_dropout=False)
        drops = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, _DropoutNd) and module.training and module.p > 0
        ]
        if drops:
            raise Apart(f"'{drops[0]}' trains and has dropout, so its steps draw random numbers.")
        batch = self.rows.batch([0], targets=True)
        head = see_output(self.model, batch) if self.rows.task == "causal-lm" else None
        if head is not None and any(isinstance(m, Update) for m in head.modules()):
            raise Apart("The output layer is adapted, and its targets are not rows of the batch.")
        names = list(attachments(self.model))
        try:
            with using_rows(self.model, names):
                part_losses(self.model, _repeated(batch, len(names)), self.rows.task, len(names))
        except UserError as error:
            raise Apart(str(error)) from error

    def backward(self, loops: Mapping[str, Loop]) -> dict[str, float]:
        """Leave the gradients of each run's mean loss over its next step, and return those losses.

        Where memory runs out, fewer runs share a pass, and a single one has passes of fewer rows.
        """
        while True:
            try:
                return self._accumulate(loops)
            except (RuntimeError, MemoryError) as error:
                if not allocation_failed(error):
                    raise
                self._fewer(loops, error)
            for loop in loops.values():
                loop.optimizer.zero_grad(set_to_none=True)
            if self.rows.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate(self, loops: Mapping[str, Loop]) -> dict[str, float]:
        train_mode(self.model, base_dropout=False)
        losses = dict.fromkeys(loops, 0.0)
        names = list(loops)
        smallest = min(loops.values(), key=lambda loop: loop.progress.micro_batch)
        for first in range(0, len(names), self.most):
            group = names[first : first + self.most]
            for part, weight in smallest.parts(smallest.passes()):
                batch = _repeated(self.rows.batch(part, targets=True), len(group))
                with using_rows(self.model, [name for name in group for _ in part]):
                    found = part_losses(self.model, batch, self.rows.task, len(group)) / weight
                    found.sum().backward()
                for name, loss in zip(group, found.tolist(), strict=True):
                    losses[name] += loss
        return losses

    def _fewer(self, loops: Mapping[str, Loop], error: BaseException) -> None:
        self.most = min(self.most, len(loops))
        if self.most == 1:
            for loop in loops.values():
                loop.halve(error)
            return
        self.most = (self.most + 1) // 2
        self.watcher.note(f"Memory ran out: {self.most} of the runs share a pass from now on.")


def _repeated(batch: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """A batch that holds the same rows so many times, one copy after the other."""
    made = {
        name: tensor.repeat(times, *(1,) * (tensor.ndim - 1))
        for name, tensor in batch.items()
        if name != POSITIONS
    }
    if POSITIONS in batch:
        rows, length = batch["labels"].shape
        at = batch[POSITIONS]
        made[POSITIONS] = torch.cat([at + i * rows * (length - 1) for i in range(times)])
    return made
