"""estimate: the memory of a run by its parts and phases, and the largest batch within a budget."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from rankwise.errors import UserError
from rankwise.lab.estimate.live import Part, Peak
from rankwise.lab.estimate.rehearsal import Rehearsal
from rankwise.train.config import FitConfig
from rankwise.train.manifest import method_record
from rankwise.train.precision import choose_device
from rankwise.train.reporter import Reporter, Silent

__all__ = ["MOST_ROWS", "Budget", "Estimate", "estimate", "largest"]

KEPT = 0.5
"""What glibc's heap holds in holes while a step runs, as a share of what is alive in it.

It is no law: benchmarks/estimate.py prints what it was in a few runs.
"""
MOST_ROWS = 1 << 16
"""No larger batch is looked for."""


@dataclass(frozen=True)
class Budget:
    """What fits in so many bytes.

    Attributes:
        bytes: the budget.
        fits: whether the run as asked does.
        batch: the largest batch size whose training steps fit; 0 where none does.
        checkpointed: the same with gradient checkpointing; None where the model has none, or it
            was asked for already.
    """

    bytes: int
    fits: bool
    batch: int
    checkpointed: int | None


@dataclass(frozen=True)
class Estimate:
    """The memory that a run needs, in bytes.

    Attributes:
        model: where the config came from.
        task: what the model is for.
        method: its name for a reader.
        device: "cpu", "cuda" or "mps".
        dtype: the number format of the base.
        batch: rows of a training pass.
        eval_batch: rows of an evaluation pass.
        length: tokens of the longest row.
        step: the parts at the peak of a training step, by the names of ``Part``. Gradients are
            those made by then, beside the activations not yet freed.
        gradients: of everything that trains, together.
        evaluation: the peak of an evaluation pass, weights and optimiser state with it.
        loading: the peak before the first step, while the model is read and cast.
        overhead: what the process holds besides: Python and the libraries. 0 on a GPU, whose
            memory holds none of them.
        kept: what the C library is likely to keep of freed memory during a step; see ``KEPT``. 0
            where it is not glibc's heap that keeps it.
        budget: what fits; None where no budget was given.
        notes: what a user should know.
    """

    model: str
    task: str
    method: str
    device: str
    dtype: str
    batch: int
    eval_batch: int
    length: int
    step: Mapping[str, int]
    gradients: int
    evaluation: int
    loading: int
    overhead: int
    kept: int
    budget: Budget | None
    notes: tuple[str, ...]

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase of a run, the overhead among it."""
        found = {
            "loading": self.loading,
            "training step": sum(self.step.values()) + self.kept,
            "evaluation": self.evaluation,
        }
        return {name: size + self.overhead for name, size in found.items()}

    @property
    def peak(self) -> int:
        """The most that the run holds."""
        return max(self.phases.values())


def estimate(
    config: FitConfig,
    labels: int = 2,
    budget: int | None = None,
    reporter: Reporter | None = None,
) -> Estimate:
    """Rehearse a run's steps on tensors without data, and say what they would hold.

    Not in it: the context and kernels of CUDA, what its allocator keeps of freed memory, and what
    an operation holds inside itself.

    Args:
        config: model (a folder, a config file or a name on a hub) and the options of the run.
        labels: classes of a classification head.
        budget: bytes to fit in.
        reporter: told what happens.

    Raises:
        UserError: the model, the method or the device cannot be had together, or the model's
            shapes depend on its data.
        ArtifactError: the config is damaged.
        EnvironmentFault: the device or transformers is not there, or the hub cannot be reached.
    """
    watcher = reporter or Silent()
    device = choose_device(config.device)
    rehearsal = Rehearsal(config, labels, device)
    on_gpu = device.type == "cuda"
    watcher.note(f"Rehearsing a step of {config.batch_size} rows of {rehearsal.length} tokens.")
    step = rehearsal.step(config.batch_size)
    notes = list(rehearsal.notes)
    if rehearsal.length < config.max_length:
        notes.append(f"The model takes no more than {rehearsal.length} tokens; that is the length.")
    made = Estimate(
        model=config.model,
        task=rehearsal.task,
        method=method_record(config)[0],
        device=device.type,
        dtype=rehearsal.choice.name,
        batch=config.batch_size,
        eval_batch=config.eval_batch_size,
        length=rehearsal.length,
        step={part.value: step.parts[part] for part in Part},
        gradients=rehearsal.gradient_bytes,
        evaluation=rehearsal.evaluation(config.eval_batch_size).total,
        loading=0 if on_gpu else _loading(rehearsal),
        overhead=0 if on_gpu else rehearsal.process_bytes,
        kept=_kept(step, device),
        budget=None,
        notes=tuple(notes),
    )
    if budget is None:
        return made
    watcher.note("Looking for the largest batch.")
    return replace(made, budget=_within(budget, made, rehearsal, config, labels, device))


def _loading(rehearsal: Rehearsal) -> int:
    """The model in float32, and where it is cast, its half as large copy beside it.

    The copy is of 16 bits either way: the one that is kept of a checkpoint in float32, or the
    checkpoint of 16 bits itself, which is read as float32 and cast back.
    """
    half = rehearsal.choice.dtype != torch.float32
    return rehearsal.base_bytes * 3 // 2 if half else rehearsal.base_bytes


def _kept(step: Peak, device: torch.device) -> int:
    """What glibc's heap is likely to hold of a step beyond what is alive at its peak.

    It grows to what the busiest moment needs and KEPT of that in holes, and seldom shrinks within
    a step. Logits are so large that they are mapped apart from it, and given back.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return 0
    return int((1 + KEPT) * step.busiest) - step.parts[Part.ACTIVATIONS]


def _held(step: Peak, device: torch.device) -> int:
    return step.total + _kept(step, device)


def _within(
    budget: int,
    made: Estimate,
    rehearsal: Rehearsal,
    config: FitConfig,
    labels: int,
    device: torch.device,
) -> Budget:
    room = budget - made.overhead

    def rows(of: Rehearsal) -> int:
        return largest(lambda batch: _held(of.step(batch), device), room)

    again = config.model_copy(update={"gradient_checkpointing": True})
    try:
        lean = None if config.gradient_checkpointing else Rehearsal(again, labels, device)
    except UserError:  # the architecture has none
        lean = None
    return Budget(
        bytes=budget,
        fits=made.peak <= budget,
        batch=rows(rehearsal),
        checkpointed=None if lean is None else rows(lean),
    )


def largest(held: Callable[[int], int], room: int) -> int:
    """The largest batch whose ``held`` bytes are at most ``room``; 0 where one row is too much.

    ``held`` grows with the batch, nearly along a line, so a line through two sizes says where to
    look next; what is found holds exactly. No more than ``MOST_ROWS`` are tried.
    """
    low, at_low = 1, held(1)
    if at_low > room:
        return 0
    high, step = MOST_ROWS + 1, max(1, held(2) - at_low)
    while high - low > 1:
        guess = min(max(low + (room - at_low) // step, low + 1), high - 1)
        at_guess = held(guess)
        if at_guess <= room:
            step = max(1, (at_guess - at_low) // (guess - low))
            low, at_low = guess, at_guess
        else:
            step = max(1, -(-(at_guess - at_low) // (guess - low)))
            high = guess
    return low
