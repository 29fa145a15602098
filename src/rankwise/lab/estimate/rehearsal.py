"""A run's own model, loss, clipping and optimiser on tensors that have a shape but no data."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves

from rankwise.attaching import attachment
from rankwise.data.encode import Encoded
from rankwise.errors import UserError
from rankwise.kernels import PlainLinear
from rankwise.lab.estimate.live import Live, Part, Peak
from rankwise.lab.estimate.overhead import of_process
from rankwise.layers import LoRAHost, all_by_seed, optimize_frozen
from rankwise.layers.fusing import frozen_linear
from rankwise.targets import find_head
from rankwise.train.attention import products_up_to
from rankwise.train.checkpoint import Progress
from rankwise.train.config import FitConfig
from rankwise.train.evaluate import Rows, row_losses
from rankwise.train.loop import Loop
from rankwise.train.model import Base, longest, quiet_transformers
from rankwise.train.precision import Choice
from rankwise.train.reporter import Silent
from rankwise.train.setup import equip, longest_input
from rankwise.train.skeleton import make_skeleton

__all__ = ["Rehearsal"]

_NO_SHAPES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


_MEASURED = 1 << 26  # numbers of the largest weight that is made to be measured


class Rehearsal:
    """A run made ready without a weight, whose steps say what they hold.

    Every operation runs on the shapes and number formats that it would have, forward and backward,
    in the loop of ``rankwise fit``; nothing of the size of the model is allocated.

    Args:
        config: the options of the run: model, method, length, number format.
        labels: classes of a classification head.
        device: where it would run.

    Attributes:
        task: what the model is for.
        length: tokens of the longest row, no more than the model takes.
        choice: the number format of the base, chosen as a run would.
        notes: what the method has to say to the user.
        base_bytes: of the model with its head as it is loaded, in float32.
        gradient_bytes: of the gradients of everything that trains.
        process_bytes: of Python and the libraries in this process.
        packed_bytes: of the packed copies that frozen layers get where that is faster here.

    Raises:
        UserError: the model, its task, the method and the number format do not fit together.
        ArtifactError: the config is damaged.
        EnvironmentFault: transformers is not installed, or the hub cannot be reached.
    """

    def __init__(self, config: FitConfig, labels: int, device: torch.device) -> None:
        model: Any
        model, self.task = make_skeleton(config.model, config.task, labels, config.revision)
        self.process_bytes = of_process(self.task)
        model.to(torch.float32).config.pad_token_id = 0
        base = Base(model, None, config.model, "", (), longest(model))  # type: ignore[arg-type]
        self._config, self._device = config, device
        self.length = longest_input(config, base)
        self.base_bytes = sum(p.nbytes for p in model.parameters())
        told = _Notes()
        self.choice: Choice = equip(config, base, device, None, told)
        self.notes = tuple(told.texts)
        chooses = config.pack == "auto" and device.type == "cpu"
        tokens = config.batch_size * self.length
        self.packed_bytes = _packed_bytes(model, tokens) if chooses else 0
        by_products = products_up_to(model, self.length) if chooses else 0
        if chooses:
            all_by_seed(model)
        self._fake, self._live = FakeTensorMode(), Live()
        self._begun = False
        kept = attachment(model).originals.values()  # in memory as well, though no part of it
        with self._fake:
            _place([model, *kept], device)
            held = self._rows(1)
            self._loop = Loop(model, held, held, config, "", Path(), lambda _: None, Silent())
            self._loop.by_products = by_products
            self._packed = torch.empty(self.packed_bytes, dtype=torch.uint8, device=device)
        self.gradient_bytes = sum(p.nbytes for p in self._loop.parameters.values())
        for module in (model, *kept):
            self._live.mark([*module.parameters(), *module.buffers()], Part.WEIGHTS)
        self._live.mark([self._packed], Part.PACKED)
        self._watch(model)

    def step(self, batch: int) -> Peak:
        """What is held at the peak of an optimiser step over passes of so many rows.

        Raises:
            UserError: the shapes of the model's tensors depend on the data.
        """
        loop, live = self._loop, self._live
        passes = [list(range(batch))] * min(2, self._config.accumulate)
        with self._running():
            loop.train_rows = self._rows(batch)
            loop.progress = Progress(micro_batch=batch)
            for _ in range(1 if self._begun else 2):  # the first step makes the optimiser's state
                live.phase = Part.ACTIVATIONS
                live.begin()
                loop.update(passes)
                states = loop.optimizer.state.values()
                live.mark(tree_leaves(list(states)), Part.OPTIMIZER)
        self._begun = True
        return live.peak

    def evaluation(self, batch: int) -> Peak:
        """What is held at the peak of an evaluation pass over so many rows.

        Raises:
            UserError: the shapes of the model's tensors depend on the data.
        """
        model = self._loop.model
        with self._running(), torch.no_grad():
            model.eval()
            self._live.phase = Part.ACTIVATIONS
            self._live.begin()
            rows = self._rows(batch).batch(list(range(batch)), targets=True)
            row_losses(model, rows, self.task)
        return self._live.peak

    @contextlib.contextmanager
    def _running(self) -> Generator[None]:
        try:
            with self._fake, self._live, quiet_transformers():
                yield
        except _NO_SHAPES as error:
            raise UserError(
                "The memory of this model cannot be told without its data, because the shapes of "
                f"its tensors depend on them ({type(error).__name__}: {error})."
            ) from error

    def _rows(self, batch: int) -> Rows:
        """Rows of the full length but for one, so that there is padding as in most batches."""
        lengths = [self.length] * (batch - 1) + [max(1, self.length - 1)]
        ids = [[1] * length for length in lengths]
        kinds: dict[str, Any] = {
            "classification": [0] * batch,
            "regression": [0.0] * batch,
            "causal-lm": ids,
        }
        encoded = Encoded(ids, lengths, list(range(batch)), kinds[self.task])
        return Rows(encoded, self.task, 0, self._device)

    def _watch(self, model: nn.Module) -> None:
        """Tell gradients, and what the head and the loss make, from activations."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._got_gradient)
        for name in find_head(model).names:
            model.get_submodule(name).register_forward_pre_hook(self._at_head, with_kwargs=True)

    def _got_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._live.mark([parameter.grad], Part.GRADIENTS)

    def _at_head(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """From here until the gradient comes back to here, what is made is the head's."""
        self._live.phase = Part.LOGITS
        for entry in tree_leaves((args, kwargs)):
            if isinstance(entry, Tensor) and entry.requires_grad:
                entry.register_hook(self._back_from_head)

    def _back_from_head(self, _: Tensor) -> None:
        self._live.phase = Part.ACTIVATIONS


def _packed_bytes(model: nn.Module, rows: int) -> int:
    """What a run adds by packing frozen layers, measured as it would on layers of their shapes.

    A very large weight is measured by a part of it.
    """
    worth: dict[tuple[object, ...], bool] = {}
    size = 0
    for module in model.modules():
        plain = frozen_linear(module)
        if not isinstance(plain, PlainLinear):
            continue
        out, into = plain.weight.shape
        shape = (out, into, plain.weight.dtype)
        if shape not in worth:
            small = nn.Linear(into, min(out, _MEASURED // into), False, dtype=plain.weight.dtype)
            worth[shape] = bool(optimize_frozen(small.requires_grad_(False), rows).packed)
        size += 2 * plain.weight.nbytes * worth[shape]
    return size


class _Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def _place(models: Iterable[nn.Module], device: torch.device) -> None:
    """Move modules from the meta device to tensors of ``device`` without data, ties kept."""
    every = [module for model in models for module in model.modules()]
    every += [module.base_layer for module in every if isinstance(module, LoRAHost)]
    made: dict[int, Tensor] = {}
    gone: list[Tensor] = []  # kept until the end, or another tensor could get the id of one
    for module in dict.fromkeys(every):
        for table in ("_parameters", "_buffers"):  # as they are: a host reads them with updates
            held: dict[str, Tensor | None] = vars(module)[table]
            for name, old in held.items():
                if old is not None:
                    gone.append(old)
                    held[name] = made.setdefault(id(old), _without_data(old, device))


def _without_data(like: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return nn.Parameter(made, like.requires_grad) if isinstance(like, nn.Parameter) else made
