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
from rankwise.layers import Shared
from rankwise.merging.effect import evaluating
from rankwise.train.reporter import Reporter

if TYPE_CHECKING:
    from rankwise.train.evaluate import Rows

__all__ = ["HIDDEN", "Cut", "Kept", "find_cut", "serving"]

HIDDEN = "rankwise_hidden"
"""The key of a batch under which the kept hidden states travel to the model."""

_CHUNK = 2**24  # bytes written at a time


@dataclass
class Cut:
    """Where a model is cut: the blocks that never train, and the module above them.

    While it is installed, a call of the model with the key ``rankwise_hidden`` runs without the
    skipped blocks: they pass their input on, and ``entry`` gets these states in place of its
    first argument. Calls without it run the whole model. What is recomputed in backward is what
    the last call of the model was.
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
            self._now = self._seen = None

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
    trained = _trained(model, order)
    if not trained or "" in trained:
        what = "a part of the model trains that is not called" if trained else "nothing trains"
        raise UserError(f"There is nothing to keep: {what}. Leave out --cache.")
    first = min(trained, key=order.index)
    blocks = [name for name in order if _is_block(model, name)]
    owner = next((name for name in blocks if f"{first}.".startswith(f"{name}.")), None)
    entry = owner or _whole(model, first, order)
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


def _trained(model: nn.Module, order: Sequence[str]) -> set[str]:
    """The modules that are called and have something that trains, by name; "" is the model itself.

    It may lie in a part of the module that is not called, as updates are not, nor are layers
    whose weight is read instead; or in another module, whose update is this one's as well.
    """
    called = {"", *order}
    found: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        owner = module.source if isinstance(module, Shared) else module
        if any(p.requires_grad for p in owner.parameters(recurse=False)):
            while name not in called:
                name = name.rpartition(".")[0]
            found.add(name)
    return found


def _whole(model: nn.Module, name: str, order: Sequence[str]) -> str:
    """The outermost module around this one that is called and trains wholly, such as a head."""
    parent = name.rpartition(".")[0]
    while parent in order and all(
        p.requires_grad for p in model.get_submodule(parent).parameters()
    ):
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
    same, mask = False, probe["attention_mask"]

    def answers(**more: Tensor) -> Tensor:
        logits = model(**probe, **more).logits
        return logits[mask.bool()] if logits.ndim == 3 else logits

    with torch.no_grad(), evaluating(model), cut.installed(model):
        try:
            whole = answers()
            states = cut.states(model, probe)
            if _per_token(states, mask):
                states = states.masked_fill(mask[..., None] == 0, 0)  # padding is not kept
            same = torch.equal(answers(**{HIDDEN: states}), whole)
        except (TypeError, ValueError, LookupError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
    if not same:
        raise UserError(
            f"The states below '{cut.entry}' of this {type(model).__name__} cannot be kept: its "
            "blocks pass on more than their first argument, or read the padding "
            f"({reason}). Leave out --cache."
        )


def _per_token(states: Tensor, mask: Tensor) -> bool:
    """Whether states are a vector for each token of a batch; else they are one for each row.

    Raises:
        UserError: they are neither.
    """
    if states.shape[:-1] in (mask.shape, mask.shape[:1]):
        return states.ndim == 3
    raise UserError(
        f"The states of {len(mask)} rows of {mask.shape[1]} tokens have the shape "
        f"{tuple(states.shape)}, which is not one vector for each token or each row, so they "
        "cannot be kept. Leave out --cache."
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
            _fill(path, size)
            flat = torch.from_file(
                str(path), shared=True, size=self.starts[-1] * self.width, dtype=like.dtype
            )
        except (OSError, RuntimeError) as error:
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


def _fill(path: Path, size: int) -> None:
    """Write zeros, as what a full disk refuses under a map ends the process without a word."""
    with path.open("wb") as file:
        for start in range(0, size, _CHUNK):
            file.write(bytes(min(_CHUNK, size - start)))


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
    lengths = train.encoded.lengths
    ends = {f(range(len(lengths)), key=lambda row: lengths[row]) for f in (min, max)}
    probe = train.batch(sorted(ends))  # the shortest row and the longest, so that there is padding
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
                per_token = _per_token(states, mask)
                if kept is None:
                    kept = _room(states, per_token, lengths, path, need)
                kept.put(part, mask, states)
                reporter.advance(first + len(part), {})
    finally:
        reporter.finish()
    assert kept is not None
    return kept


def _room(states: Tensor, per_token: bool, lengths: Sequence[int], path: Path, need: _Need) -> Kept:
    vectors = sum(lengths) if per_token else len(lengths)
    need.take(vectors * states.shape[-1] * states.element_size())
    path.unlink(missing_ok=True)
    return Kept(path, lengths, per_token, states)
