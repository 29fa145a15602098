"""Single products on this processor: thin ones as written and turned, and a packed weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from benchmarks.speed.timing import alternate, ratio
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.kernels.packed import PackedLinear, can_pack

__all__ = ["packing", "rows", "thin"]

N, R, CALLS = 1088, 8, 20
SHAPES = ((384, 384), (1536, 384), (384, 1536))  # MiniLM's (out, in)


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """One thread, so that a row says what a kernel does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for out, inner in SHAPES:
            on = f"{N:,} rows, in {inner:,}, out {out:,}, 1 thread"
            yield _row("dB = dYᵀ P, r = 8: as written / turned", on, thin(out), rounds)
            if can_pack(torch.empty(out, inner)):
                yield _row("x Wᵀ: F.linear / packed", on, packing(out, inner), rounds)
    finally:
        torch.set_num_threads(threads)


def thin(out: int) -> Mapping[str, Callable[[], Tensor]]:
    """dB (out, r) of dY (N, out) and P (N, r), both ways."""
    dy, p = torch.randn(N, out), torch.randn(N, R)
    return {"as written": lambda: dy.T @ p, "turned": lambda: (p.T @ dy).T}


def packing(out: int, inner: int) -> Mapping[str, Callable[[], Tensor]]:
    """A frozen layer as torch runs it, and with its weight packed."""
    module = nn.Linear(inner, out).requires_grad_(False)
    packed, x = PackedLinear(module, N), torch.randn(N, inner)
    w, b = module.weight, module.bias
    return {"F.linear": lambda: F.linear(x, w, b), "packed": lambda: packed(x)}


def _row(
    measure: str, on: str, programs: Mapping[str, Callable[[], Tensor]], rounds: int
) -> dict[str, Any]:
    def often(program: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                program()

        return run

    seconds = alternate({name: often(p) for name, p in programs.items()}, rounds)
    first, second = seconds.values()
    made = ratio(first, second)
    middle = {n: 1e3 * sorted(s)[len(s) // 2] / CALLS for n, s in seconds.items()}
    return {
        "measure": measure,
        "on": on,
        "ratio": [made.value, made.low, made.high],
        "milliseconds": middle,
    }
