"""What the frozen layers below the first trained one give for each row, computed once and kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.errors import EnvironmentFault, UserError
from rankwise.layers import Update
from rankwise.merging.effect import evaluating
from rankwise.train.reporter import Reporter

if TYPE_CHECKING:
    from rankwise.train.evaluate import Rows

__all__ = ["HIDDEN", "Cut", "Kept", "find_cut", "serving"]

HIDDEN = "rankwise_hidden"
"""The key of a batch under which the kept hidden states travel to the model."""


@dataclass
class Cut:
    """Where a model is cut: the blocks that never train, and the module above them.

    While it is installed, a call of the model with the key ``rankwise_hidden`` runs without the
    skipped blocks: they pass their input on, and ``entry`` gets these states in place of its
    first argument. Calls without it run the whole model.
    """

    entry: str
    skipped: tuple[str, ...]
    _now: Tensor | None = field(default=None, repr=False)
    _seen: Tensor | None = field(default=None, repr=False)
    _tuples: set[str] = field(default_factory=set[str], repr=False)  # blocks that give a tuple

    @contextlib.contextmanager
    def installed(self, model: nn.Module) -> Generator[None]:
        """The model serves kept states for the length of the block."""
        blocks = {name: model.get_submodule(name) for name in self.skipped}
        own = {n: vars(b)["forward"] for n, b in blocks.items() if "forward" in vars(b)}
        hooks = [
            model.register_forward_pre_hook(self._take, with_kwargs=True),
            model.register_forward_hook(self._drop, always_call=True),
            model.get_submodule(self.entry).register_forward_pre_hook(
                self._enter, with_kwargs=True
            ),
        ]
        for name, block in blocks.items():
            block.forward = self._passing(name, block.forward)
        try:
            yield
        finally:
            for name, block in blocks.items():
                del block.forward
                if name in own:
                    block.forward = own[name]
            for hook in hooks:
                hook.remove()

    def states(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """What ``entry`` gets as its first argument in a whole run of the model; detached."""
        self._seen = None
        model(**inputs)
        assert self._seen is not None
        return self._seen

    def _take(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._now = kwargs.get(HIDDEN)
        return args, {name: value for name, value in kwargs.items() if name != HIDDEN}

    def _drop(self, module: nn.Module, args: Any, made: Any) -> None:
        self._now = None

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._now is None:
            self._seen = (args[0] if args else kwargs["hidden_states"]).detach()
            return None
        if args:
            return (self._now, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._now}

    def _passing(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a block that passes its input on while kept states are served."""

        def passing(*args: Any, **kwargs: Any) -> Any:
            if self._now is None:
                made = forward(*args, **kwargs)
                if isinstance(made, tuple):
                    self._tuples.add(name)
                return made
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if name in self._tuples else hidden

        return passing


def find_cut(model: nn.Module, probe: Mapping[str, Tensor]) -> Cut:
    """The cut below the first module that trains, tried on a batch.

    Blocks are the equal members of an nn.ModuleList, one after another. What runs before them
    (embeddings) is computed each time; it costs little. The cut is taken when the model's answer
    from the kept states equals that of the whole model, bit for bit.

    Raises:
        UserError: nothing frozen lies below, or the model is not such a chain of blocks.
    """
    order = _order(model, probe)
    trained = [name for name in order if _trains(model.get_submodule(name))]
    if not trained:
        raise UserError("There is nothing to keep: nothing of this model trains.")
    first = trained[0]
    blocks = [name for name in order if _is_block(model, name)]
    owner = next((name for name in blocks if f"{first}.".startswith(f"{name}.")), None)
    entry = owner or _whole(model, first)
    below = order[: order.index(entry)]
    skipped = tuple(name for name in blocks if name in below and not entry.startswith(f"{name}."))
    if not skipped:
        raise UserError(
            f"There is nothing to keep: what trains begins at '{first}', and no frozen block lies "
            "below it. Train upper blocks only (--layers), or the head alone (--method head), or "
            "leave out --cache."
        )
    cut = Cut(entry, skipped)
    _try(model, cut, probe)
    return cut


def _order(model: nn.Module, probe: Mapping[str, Tensor]) -> list[str]:
    """The names of all modules in the order in which they are first called."""
    called: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, _a, name=name: called.setdefault(name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(**probe)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)


def _trains(module: nn.Module) -> bool:
    """Whether a parameter of the module itself, or an update of it, trains."""
    own = any(p.requires_grad for p in module.parameters(recurse=False))
    updates = (m for m in module.children() if isinstance(m, (Update, nn.ModuleDict)))
    return own or any(p.requires_grad for m in updates for p in m.parameters())


def _whole(model: nn.Module, name: str) -> str:
    """The outermost module around this one of which everything trains, such as a head."""
    parent = name.rpartition(".")[0]
    while parent and all(p.requires_grad for p in model.get_submodule(parent).parameters()):
        name, parent = parent, parent.rpartition(".")[0]
    return name


def _is_block(model: nn.Module, name: str) -> bool:
    parent, _, index = name.rpartition(".")
    chain = model.get_submodule(parent) if parent else model
    return (
        isinstance(chain, nn.ModuleList)
        and index.isdigit()
        and len({type(block) for block in chain}) == 1
    )


def _try(model: nn.Module, cut: Cut, probe: Mapping[str, Tensor]) -> None:
    """Refuse a cut from which the model does not compute what it computes whole."""
    reason = "the answers from kept states are not those of the whole model"
    same = False
    with torch.no_grad(), evaluating(model), cut.installed(model):
        try:
            whole = model(**probe).logits
            states = cut.states(model, probe)
            same = torch.equal(model(**probe, **{HIDDEN: states}).logits, whole)
        except (TypeError, ValueError, LookupError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
    if not same:
        raise UserError(
            f"The states below '{cut.entry}' of this {type(model).__name__} cannot be kept: its "
            f"blocks pass on more than their first argument ({reason}). Leave out --cache."
        )


class Kept:
    """The states of all rows of one data set in a file that is mapped into memory.

    A row has one vector where ``entry`` reads one for each text, and one for each of its tokens
    where it reads the tokens; then padding is left out, and comes back as zeros.
    """

    def __init__(self, path: Path, lengths: Sequence[int], per_token: bool, like: Tensor) -> None:
        counts = list(lengths) if per_token else [1] * len(lengths)
        self.per_token = per_token
        self.width = like.shape[-1]
        self.starts = [0]
        for count in counts:
            self.starts.append(self.starts[-1] + count)
        self.device = like.device
        size = self.starts[-1] * self.width * like.element_size()
        try:
            flat = torch.from_file(
                str(path), shared=True, size=self.starts[-1] * self.width, dtype=like.dtype
            )
        except RuntimeError as error:
            raise EnvironmentFault(
                f"The file for kept states, '{path}' ({size:,} bytes), cannot be made: "
                f"{str(error).splitlines()[0]}. Leave out --cache, or put --out on another disk."
            ) from error
        self.numbers = flat.view(-1, self.width)

    def put(self, rows: Sequence[int], mask: Tensor, states: Tensor) -> None:
        """Keep the states of some rows: (rows, width), or (rows, length, width) where mask is 1."""
        for i, row in enumerate(rows):
            part = states[i][mask[i].bool()] if self.per_token else states[i][None]
            self.numbers[self.starts[row] : self.starts[row + 1]] = part.cpu()

    def get(self, rows: Sequence[int], mask: Tensor) -> Tensor:
        """The states of these rows, on the model's device, padded as the mask is."""
        parts = [self.numbers[self.starts[r] : self.starts[r + 1]] for r in rows]
        flat = torch.cat(parts).to(self.device)
        if not self.per_token:
            return flat
        made = flat.new_zeros(*mask.shape, self.width)
        made[mask.bool()] = flat
        return made


@contextlib.contextmanager
def serving(
    model: nn.Module,
    train: Rows,
    held: Rows,
    folder: Path,
    batch_size: int,
    limit: float,
    reporter: Reporter,
) -> Generator[tuple[Rows, Rows]]:
    """For the length of the block: the same rows, whose batches bring the kept states along.

    All rows go through the frozen part once, in evaluation mode, in order of length and in batches
    that follow from the data alone, so that a run that goes on keeps the same states again. They
    lie in two files in ``folder``, which are removed at the end.

    Args:
        folder: of the run.
        batch_size: rows at a time.
        limit: the most bytes that the files may have together.
        reporter: told how far it is.

    Raises:
        UserError: nothing can be kept, or it needs more than ``limit`` bytes.
        EnvironmentFault: a file cannot be made.
    """
    probe = train.batch(list(range(min(2, len(train.encoded)))))
    probe.pop("labels", None)
    cut = find_cut(model, probe)
    files = [folder / f"frozen-{name}.cache" for name in ("train", "eval")]
    with cut.installed(model):
        try:
            need = _Need(limit)
            kept = [
                _keep(model, cut, rows, path, batch_size, need, reporter)
                for rows, path in zip((train, held), files, strict=True)
            ]
            reporter.note(
                f"Kept what {len(cut.skipped)} frozen blocks give for each row "
                f"({need.taken / 1e6:,.1f} MB): they run no more."
            )
            yield replace(train, kept=kept[0]), replace(held, kept=kept[1])
        finally:
            for path in files:
                path.unlink(missing_ok=True)


@dataclass
class _Need:
    """Bytes that may be kept and bytes that are."""

    limit: float
    taken: int = 0

    def take(self, size: int) -> None:
        self.taken += size
        if self.taken > self.limit:
            raise UserError(
                f"Keeping what the frozen layers give takes {self.taken / 1e9:.3f} GB or more, and "
                f"--cache allows {self.limit / 1e9:.3f}. Give it more, or leave it out."
            )


def _keep(
    model: nn.Module,
    cut: Cut,
    rows: Rows,
    path: Path,
    batch_size: int,
    need: _Need,
    reporter: Reporter,
) -> Kept:
    """Run the rows through the frozen part and keep what comes out below ``cut.entry``."""
    lengths = rows.encoded.lengths
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    kept: Kept | None = None
    reporter.start("frozen layers", len(order), 0)
    try:
        with torch.no_grad(), evaluating(model):
            for first in range(0, len(order), batch_size):
                part = order[first : first + batch_size]
                inputs = {k: v for k, v in rows.batch(part).items() if k != "labels"}
                states, mask = cut.states(model, inputs), inputs["attention_mask"]
                if kept is None:
                    kept = _room(states, mask, lengths, path, need)
                kept.put(part, mask, states)
                reporter.advance(first + len(part), {})
    finally:
        reporter.finish()
    assert kept is not None
    return kept


def _room(states: Tensor, mask: Tensor, lengths: Sequence[int], path: Path, need: _Need) -> Kept:
    per_token = states.ndim == 3 and states.shape[:2] == mask.shape
    vectors = sum(lengths) if per_token else len(lengths)
    need.take(vectors * states.shape[-1] * states.element_size())
    path.unlink(missing_ok=True)
    return Kept(path, lengths, per_token, states)
