"""One loop for every method: steps, evaluation, checkpoints, and a stop that loses nothing."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.data.batches import BatchPlan
from rankwise.errors import EnvironmentFault, UserError
from rankwise.io.files import append_text
from rankwise.methods.groups import parameter_groups
from rankwise.train import checkpoint
from rankwise.train.answers import Answers
from rankwise.train.attention import attending
from rankwise.train.checkpoint import Progress
from rankwise.train.config import FitConfig
from rankwise.train.evaluate import Rows, batch_loss, measure, targets_in
from rankwise.train.frozen import train_mode
from rankwise.train.memory import give_back
from rankwise.train.metrics import better
from rankwise.train.nested import Nested
from rankwise.train.optim import adamw, learning_rate, set_rate
from rankwise.train.precision import allocation_failed
from rankwise.train.reporter import Reporter
from rankwise.train.signals import Interrupted, StopRequest

__all__ = ["Diverged", "Loop", "Step"]

_LOGGED_STEPS = 1000


class Diverged(UserError):
    """Too many steps in a row had a loss or a gradient that was not a finite number."""


@dataclass(frozen=True)
class Step:
    """One optimiser step's figures; ``finite`` is false when it was skipped."""

    loss: float
    grad_norm: float
    finite: bool


class Loop:
    """Trains what requires gradients in ``model`` and keeps the run folder up to date.

    Args:
        model: on its device, with a method attached.
        train, held: training and evaluation rows.
        config: the options.
        metric: the metric that picks the best.
        folder: the run folder; ``metrics.jsonl`` and ``checkpoints/`` are written here.
        save_best: called with the answers of an evaluation that decides what is kept, to write
            the adapter: the best so far, or with ``select: last`` the last.
        reporter: told what happens.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Rows,
        held: Rows,
        config: FitConfig,
        metric: str,
        folder: Path,
        save_best: Callable[[Answers], None],
        reporter: Reporter,
    ) -> None:
        self.model = model
        self.train_rows = train
        self.held = held
        self.config = config
        self.metric = metric
        self.folder = folder
        self.save_best = save_best
        self.reporter = reporter
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        rates = parameter_groups(
            model,
            0.0,
            lora_plus=config.lora_plus,
            head=config.head_ratio,
            weight_decay=config.weight_decay,
        )
        self.optimizer = adamw(rates)
        self.state = self.parameters | dict(checkpoint.frozen_state(model))
        lengths = train.encoded.lengths
        self.plan = BatchPlan(lengths, config.batch_size, config.seed, group=config.group_by_length)
        self.steps_per_epoch = math.ceil(len(self.plan) / config.accumulate)
        planned = max(1, math.ceil(config.epochs * self.steps_per_epoch))
        self.total = min(planned, config.max_steps or planned)
        self.eval_every = config.eval_every or self.steps_per_epoch
        self.log_every = max(1, self.total // _LOGGED_STEPS)
        self.progress = Progress(micro_batch=config.batch_size)
        self.by_products = 0  # attention of rows of up to so many tokens
        self.nested = Nested(model, config.seed) if config.train_nested else None
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, or from the start when none was written yet.

        Raises:
            ArtifactError: there are checkpoints, and all are damaged.
        """
        found, notes = checkpoint.load_newest(
            self.folder / "checkpoints", self.state, self.optimizer, self.train_rows.device
        )
        for note in notes:
            self.reporter.note(note)
        if found is not None:
            self.progress = found
        log = self.folder / "metrics.jsonl"
        if log.exists():
            with log.open("r+b") as stream:
                stream.truncate(min(self.progress.log_bytes, log.stat().st_size))
        self.reporter.note(
            f"Going on from step {found.step} of {self.total}."
            if found is not None
            else "No checkpoint was written; starting again from step 0."
        )

    def run(self) -> Progress:
        """Train to the last step.

        Raises:
            Interrupted: a signal asked to stop; everything is saved.
            Diverged: too many steps in a row were not finite.
            EnvironmentFault: memory runs out with a single row.
        """
        self.reporter.start("training", self.total, self.progress.step)
        try:
            with StopRequest(self.reporter.note) as stop:
                while not self.done:
                    self.advance()
                    self.settle(stop.number)
        finally:
            self.reporter.finish()
        return self.progress

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.progress.step >= self.total

    def settle(self, stop: int | None) -> None:
        """After a step: measure and save where it is time to, and end if a signal asked for it.

        Raises:
            Interrupted: ``stop`` is a signal's number; everything is saved.
        """
        step = self.progress.step
        if step % self.eval_every == 0 or step == self.total:
            self._evaluate()
        if stop is not None:
            self.save()
            raise Interrupted(stop, f"rankwise fit --resume --out {self.folder}")
        overdue = time.monotonic() - self._saved_at >= 60 * self.config.save_minutes
        if overdue or step == self.total or step % self.steps_per_epoch == 0:
            self.save()

    def silent_parameters(self) -> list[str]:
        """Names of trained parameters that never had a gradient other than zero."""
        live = set(self.progress.live)
        return [name for name in self.parameters if name not in live]

    def advance(self, loss: float | None = None, seconds: float = 0.0) -> None:
        """One step over :meth:`passes`, counted, logged and shown.

        Args:
            loss: the mean loss, where its gradients have been computed; see :meth:`update`.
            seconds: what that took of this run's time.

        Raises:
            Diverged: this and too many steps before it were not finite.
        """
        began = time.perf_counter()
        step = self.progress.step
        rate = learning_rate(step, self.total, self.config.learning_rate, self.config.warmup)
        set_rate(self.optimizer, rate)
        result = self.update(self.passes(), loss)
        self._count(result, seconds + time.perf_counter() - began)
        done = self.progress.step
        if done % self.log_every == 0 or done == self.total:
            self._log_step(rate, result.grad_norm)
        shown = {"loss": result.loss, "skipped": float(self.progress.skipped)}
        self.reporter.advance(done, {k: v for k, v in shown.items() if k == "loss" or v})
        none_taken = done == self.total == self.progress.skipped
        if self.progress.skipped_in_row >= self.config.max_skipped or none_taken:
            raise Diverged(
                f"Stopped at step {done}: the loss or the gradient was not a finite number for "
                f"{self.progress.skipped_in_row} steps in a row. Lower --lr (now "
                f"{self.config.learning_rate:g}), use --dtype float32, or look for broken rows."
            )

    def update(self, passes: list[list[int]], loss: float | None = None) -> Step:
        """One optimiser step over these rows; none where the loss or a gradient is not finite.

        With a ``loss`` the parameters hold its gradients already; else they are computed.
        """
        if loss is None:
            train_mode(self.model, self.config.base_drops)
            loss = self._backward(passes)
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), self.config.max_grad_norm
        ).item()
        result = Step(loss, norm, math.isfinite(loss) and math.isfinite(norm))
        if result.finite:
            self._note_live()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def passes(self) -> list[list[int]]:
        """The rows of each pass of the next step; they follow from the seed and the step alone."""
        epoch, index = divmod(self.progress.step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self.plan.epoch(epoch))
        first = index * self.config.accumulate
        return self._epoch[1][first : first + self.config.accumulate]

    def _backward(self, passes: list[list[int]]) -> float:
        """Leave the gradients of the mean loss over all rows of the step, and return that loss.

        When memory runs out the step starts anew with passes of half the size; the mean is over
        the same rows.
        """
        device = self.train_rows.device
        rng = checkpoint.capture_rng(device)
        while True:
            try:
                with self._ranks():
                    return self._accumulate(passes)
            except (RuntimeError, MemoryError) as error:
                if not allocation_failed(error):
                    raise
                self.halve(error)
            self.optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            checkpoint.restore_rng(rng, device)

    def _ranks(self) -> contextlib.AbstractContextManager[None]:
        """The ranks of this step: all, or with nested training the first of them."""
        if self.nested is None:
            return contextlib.nullcontext()
        return self.nested.first(self.nested.rank(self.progress.step))

    def _accumulate(self, passes: list[list[int]]) -> float:
        total = 0.0
        for part, weight in self.parts(passes):
            batch = self.train_rows.batch(part, targets=True)
            with self.attending(part):
                loss = batch_loss(self.model, batch, self.train_rows.task) / weight
                loss.backward()
            total += loss.item()
        return total

    def attending(self, rows: list[int]) -> contextlib.AbstractContextManager[object]:
        """How attention is computed in a pass of these rows."""
        lengths = self.train_rows.encoded.lengths
        return attending(self.by_products, max(lengths[row] for row in rows))

    def parts(self, passes: list[list[int]]) -> Iterator[tuple[list[int], int]]:
        """The rows of a step, as many at a time as memory holds, and what its losses add up to."""
        task, encoded = self.train_rows.task, self.train_rows.encoded
        weight = max(1, sum(targets_in(encoded, rows, task) for rows in passes))
        for rows in passes:
            for first in range(0, len(rows), self.progress.micro_batch):
                yield rows[first : first + self.progress.micro_batch], weight

    def halve(self, error: BaseException) -> None:
        """Let passes hold half as many rows from now on, as memory ran out.

        Raises:
            EnvironmentFault: they hold a single one.
        """
        size = self.progress.micro_batch
        if size == 1:
            raise EnvironmentFault(
                "Memory ran out with a single row. Use --recompute, --gradient-checkpointing, a "
                "smaller --max-length, or --dtype bfloat16."
            ) from error
        self.progress = replace(self.progress, micro_batch=max(1, size // 2))
        passes = math.ceil(self.config.batch_size / self.progress.micro_batch)
        self.reporter.note(
            f"Memory ran out at step {self.progress.step + 1}: passes now hold "
            f"{self.progress.micro_batch} rows instead of {size}; each step still learns from the "
            f"same rows. To start that way: --batch-size {self.progress.micro_batch} --accumulate "
            f"{self.config.accumulate * passes}"
        )

    def _note_live(self) -> None:
        if len(self.progress.live) == len(self.parameters):
            return
        new = [
            name
            for name in self.silent_parameters()
            if (grad := self.parameters[name].grad) is not None and bool(grad.any())
        ]
        self.progress = replace(self.progress, live=(*self.progress.live, *new))

    def _count(self, result: Step, seconds: float) -> None:
        p = self.progress
        window = (p.window[0] + result.loss, p.window[1] + 1) if result.finite else p.window
        self.progress = replace(
            p,
            step=p.step + 1,
            seconds=p.seconds + seconds,
            skipped=p.skipped + (not result.finite),
            skipped_in_row=0 if result.finite else p.skipped_in_row + 1,
            window=window,
        )

    def _log_step(self, rate: float, grad_norm: float) -> None:
        total, count = self.progress.window
        self._log(
            {
                "event": "train",
                "loss": total / count if count else None,
                "lr": rate,
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                "seconds": round(self.progress.seconds, 3),
                "skipped": self.progress.skipped,
            }
        )
        self.progress = replace(self.progress, window=(0.0, 0))

    def _evaluate(self) -> None:
        """Measure, and save what is to be kept; the generators are left as they were."""
        rng = checkpoint.capture_rng(self.train_rows.device)
        began = time.perf_counter()
        give_back()
        metrics, answers = measure(self.model, self.held, self.config.eval_batch_size)
        give_back()
        seconds = self.progress.eval_seconds + time.perf_counter() - began
        self.progress = replace(self.progress, eval_seconds=seconds)
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._log({"event": "eval", **finite})
        p = self.progress
        if self.config.select == "last":
            kept = p.step == self.total
        else:
            kept = better(self.metric, metrics[self.metric], p.best) or p.best_step is None
        if kept:
            best = metrics[self.metric]
            self.progress = replace(p, best=best, best_step=p.step, best_metrics=metrics)
            self.save_best(answers)
        epoch = p.step / self.steps_per_epoch
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        self.reporter.note(f"epoch {epoch:.2f}, step {p.step}: {shown}")
        checkpoint.restore_rng(rng, self.train_rows.device)

    def _log(self, row: Mapping[str, Any]) -> None:
        step = self.progress.step
        epoch = round(step / self.steps_per_epoch, 4)
        line = json.dumps({"event": row["event"], "step": step, "epoch": epoch, **row}) + "\n"
        length = append_text(self.folder / "metrics.jsonl", line)
        self.progress = replace(self.progress, log_bytes=length)

    def save(self) -> None:
        """Write a checkpoint of the run as it is now."""
        checkpoint.save(
            self.folder / "checkpoints",
            self.progress,
            self.state,
            self.optimizer,
            self.train_rows.device,
            self.config.keep_checkpoints,
        )
        self._saved_at = time.monotonic()
