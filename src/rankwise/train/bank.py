"""Bank: one model with the adapters of several runs, through which their steps go in one pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from rankwise.attaching import Lent, attach, attachments, using_rows
from rankwise.errors import UserError
from rankwise.train import checkpoint
from rankwise.train.config import FitConfig
from rankwise.train.evaluate import Rows, part_losses
from rankwise.train.frozen import Kernels, choose_kernels, recompute_frozen, train_mode
from rankwise.train.language import POSITIONS, see_output
from rankwise.train.loop import Loop
from rankwise.train.precision import allocation_failed
from rankwise.train.reporter import Reporter

__all__ = ["Apart", "Bank", "tree"]


class Apart(UserError):
    """Runs cannot share the passes of their base; each can be trained by itself."""


def tree(model: Any) -> Any:
    """A model of the same tensors, whose modules are others."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Bank:
    """A base with the adapters of several runs, each of which has a model of its own as well.

    Args:
        base: a :func:`tree` of the base without adapters; it is changed in place.
        models: of the runs, by their names, ready to train; their base has the same tensors.
        config: of any of the runs, as far as it is that of all.
        rows: the training rows.
        watcher: told what is done.
        before: the manifest of a run that goes on, whose kernels are taken.

    Attributes:
        kernels: those that the base is computed by.

    Raises:
        Apart: the steps of these runs cannot share a pass.
    """

    def __init__(
        self,
        base: Any,
        models: Mapping[str, nn.Module],
        config: FitConfig,
        rows: Rows,
        watcher: Reporter,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.rows, self.watcher = base, rows, watcher
        self.most = len(models)  # that share a pass
        for name, model in models.items():
            attach(base, Lent(model), name=name)
        if hasattr(base.config, "use_cache"):
            base.config.use_cache = False  # one cache for all runs would mix their rows
        base.to(rows.device)
        self._try()
        if config.recompute:
            recompute_frozen(base, watcher)
        self.kernels = Kernels()
        if config.pack == "auto":
            size = config.batch_size * len(models)
            self.kernels = choose_kernels(base, rows.encoded.lengths, size, before, watcher)

    def _try(self) -> None:
        """Take a step's forward pass with the shortest and the longest row of each run.

        Raises:
            Apart: it draws random numbers or keeps statistics, or it cannot be done.
        """
        train_mode(self.model, base_dropout=False)
        for name, module in self.model.named_modules():
            if isinstance(module, _DropoutNd) and module.training and module.p > 0:
                raise Apart(f"'{name}' trains and has dropout, so its steps draw random numbers.")
        lengths = self.rows.encoded.lengths
        ends = sorted({f(range(len(lengths)), key=lengths.__getitem__) for f in (min, max)})
        batch = self.rows.batch(ends, targets=True)
        if self.rows.task == "causal-lm":
            self._refuse_output(batch)
        names = list(attachments(self.model))
        generators = checkpoint.capture_rng(self.rows.device)
        kept = {n: b.clone() for n, b in self.model.named_buffers()}
        try:
            with using_rows(self.model, [name for name in names for _ in ends]):
                part_losses(self.model, _repeated(batch, len(names)), self.rows.task, len(names))
        except (UserError, RuntimeError, ValueError, TypeError) as error:
            if not allocation_failed(error):
                raise Apart(f"The model does not take rows of several runs: {error}") from error
        if not _same(generators, checkpoint.capture_rng(self.rows.device)):
            checkpoint.restore_rng(generators, self.rows.device)
            raise Apart("Its steps draw random numbers.")
        changed = [n for n, b in self.model.named_buffers() if not torch.equal(b, kept[n])]
        if changed:
            raise Apart(f"'{changed[0]}' changes with each step.")

    def _refuse_output(self, batch: Mapping[str, Tensor]) -> None:
        """Targets go through the output layer without their rows, so that it must be all runs'."""
        if see_output(self.model, batch) is None:
            return
        own: Any = self.model.get_output_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is own)
        for record in attachments(self.model).values():
            for one in (*record.copies, *(site for site, _ in record.places.values())):
                if f"{one}.".startswith(f"{name}.") or name.startswith(f"{one}."):
                    raise Apart(f"'{one}' trains, and the output layer must be that of all runs.")

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
                shared = using_rows(self.model, [name for name in group for _ in part])
                with shared, smallest.attending(part):
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


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states of the generators are the same."""
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in ((one[name], other[name]) for name in one)
    )
