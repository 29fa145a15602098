"""Running the bare base over a few batches to look at it, and leaving it exactly as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.inits.place import Place

__all__ = ["Batch", "Look", "batched", "call", "hooked", "name_all", "untouched"]

Batch = Mapping[str, object] | Sequence[object] | Tensor
"""What a model is called with: ``model(**batch)``, ``model(*batch)`` or ``model(batch)``."""

Look = Callable[[nn.Module, Sequence[Place], Tensor, Tensor], Tensor | None]
"""Called with a module, its places, its input x and its output y; may give another y."""


def call(model: nn.Module, batch: Batch) -> object:
    """The model's output for one batch."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch)


@contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Evaluation mode inside; afterwards modes and random numbers are what they were before.

    Modes are set one by one, because a module's ``train`` and ``eval`` may do more than that. The
    fast path of nn.TransformerEncoder, which skips the modules inside it, is off meanwhile.
    """
    modes = [(module, module.training) for module in model.modules()]
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=sorted(cuda)):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, _ in modes:
                module.training = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training in modes:
                module.training = training


def batched(owner: str, batches: Iterable[Batch], model: nn.Module) -> Iterator[tuple[int, Batch]]:
    """The batches with their numbers, from 0, their tensors on the model's (first) device.

    Raises:
        UserError: there is none.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))
    number = -1
    for number, batch in enumerate(batches):
        yield number, _moved(batch, device)
    if number < 0:
        raise UserError(
            f"{owner} was given no batches. It needs a few, as a list or a DataLoader; a generator "
            "that was run through before is empty."
        )


def _moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; where it is there already, the very same object."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if all(part.device == device for part in parts if isinstance(part, Tensor)):
        return batch
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return tuple(v.to(device) if isinstance(v, Tensor) else v for v in batch)


@contextmanager
def hooked(places: Sequence[Place], look: Look) -> Generator[None]:
    """Call ``look`` whenever the module of a place is called; parts of one module come together."""
    owners: dict[nn.Module, list[Place]] = {}
    for place in places:
        owners.setdefault(place.module, []).append(place)
    with ExitStack() as stack:
        for module, parts in owners.items():
            handle = module.register_forward_hook(_hook(parts, look), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(parts: Sequence[Place], look: Look) -> Callable[..., Tensor | None]:
    def hook(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], y: object
    ) -> Tensor | None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or not isinstance(y, Tensor):
            raise UserError(
                f"'{parts[0].name}': {type(module).__name__} was called without a tensor, or gave "
                "none, so what it does cannot be watched. Exclude it."
            )
        return look(module, parts, x, y)

    return hook


def name_all(names: Iterable[str], limit: int = 8) -> str:
    """Names in quotes, the first few of many."""
    every = [f"'{name}'" for name in names]
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more
