"""Pieces of a step by themselves: thin products, packed weights, dropout, attention, AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from benchmarks.speed.timing import alternate, ratio
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.kernels import dropped
from rankwise.kernels.packed import PackedLinear, can_pack
from rankwise.kernels.thin import add_spread, gathered, narrow
from rankwise.train.attention import attending

__all__ = ["attention", "dropout", "masked", "optimizing", "packing", "pieces", "rows", "thin"]

N, R, CALLS = 1088, 8, 20
_CACHES = 100_000_000  # bytes, more than they hold
SHAPES = ((384, 384), (1536, 384), (384, 1536))  # MiniLM's (out, in)


def _factors(r: int, layers: int, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The shapes of A and B of every linear layer."""
    return [pair for out, inner in shapes * layers for pair in ((r, inner), (out, r))]


MODELS = {
    "MiniLM, r = 8": _factors(8, 6, (SHAPES[0],) * 4 + SHAPES[1:]),
    "Llama of 1.1B, r = 16": _factors(
        16, 22, ((2048, 2048), (256, 2048)) * 2 + ((5632, 2048),) * 2 + ((2048, 5632),)
    ),
}


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
    for out, inner in SHAPES:
        on = f"{N:,} rows, in {inner:,}, out {out:,}, {threads} threads"
        measure = "the thin products of a layer's step, r = 8: whole / a piece for each thread"
        yield _row(measure, on, pieces(out, inner), rounds)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for inner in (384, 1536):
            on = f"{N:,} × {inner:,}, {name}, {threads} threads"
            yield _row(
                "dropout, forward and gradient: torch / by seed", on, dropout(inner, dtype), rounds
            )
            measure = "dx += s · (Z A) ∘ m, r = 8: two functions / one"
            yield _row(measure, on, masked(inner, dtype), rounds)
        for length in (34, 128, 256):
            on = f"8 rows of {length} tokens, 12 heads of 32, {name}, {threads} threads"
            measure = "attention, forward and gradient: fused / by products"
            yield _row(measure, on, attention(length, dtype), rounds, calls=2)
    for on, shapes in MODELS.items():
        measure = "clipping and AdamW: as many tensors / one flat tensor"
        yield _row(measure, f"{on}, {len(shapes)} tensors", optimizing(shapes), rounds, calls=1)


def thin(out: int) -> Mapping[str, Callable[[], Tensor]]:
    """dB (out, r) of dY (N, out) and P (N, r), both ways."""
    dy, p = torch.randn(N, out), torch.randn(N, R)
    return {"as written": lambda: dy.T @ p, "turned": lambda: (p.T @ dy).T}


def pieces(out: int, inner: int) -> Mapping[str, Callable[[], tuple[Tensor, Tensor]]]:
    """P, Z, dA, dB and both additions, with x and dY that no cache holds any more, as in a step."""
    count = 1 + _CACHES // (4 * N * (inner + out))
    kept = [(torch.randn(N, inner), torch.randn(N, out)) for _ in range(count)]
    turn = itertools.cycle(range(count))
    A, B, y, dx = (torch.randn(s) for s in ((R, inner), (out, R), (N, out), (N, inner)))

    def step(narrowed: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x, dy = kept[next(turn)]
        p, z = narrowed(A, x), narrowed(B.T, dy)
        add_spread(y, p, B.T)
        add_spread(dx, z, A)
        return gathered(z, x), gathered(p, dy)

    return {"whole": lambda: step(lambda M, rows: M @ rows.T), "pieces": lambda: step(narrow)}


def dropout(inner: int, dtype: torch.dtype) -> Mapping[str, Callable[[], None]]:
    """Dropout of (N, in) with p = 0.1, drawn by torch and by seed."""
    x = torch.randn(N, inner, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    return {
        "torch": lambda: F.dropout(x, 0.1).backward(dy),
        "by seed": lambda: dropped(x, 0.1).backward(dy),
    }


def masked(inner: int, dtype: torch.dtype) -> Mapping[str, Callable[[], Tensor]]:
    """What a branch with dropout adds to dx (N, in), with and without memory for the product."""
    z, A, dx = (torch.randn(s, dtype=dtype) for s in ((R, N), (R, inner), (N, inner)))
    mask = (torch.rand(N, inner) > 0.1).to(dtype)
    return {
        "two": lambda: dx.add_((1e-3 * z.T @ A) * mask),
        "one": lambda: dx.addcmul_(z.T @ A, mask, value=1e-3),
    }


def attention(length: int, dtype: torch.dtype) -> Mapping[str, Callable[[], None]]:
    """Attention without dropout as torch chooses to compute it, and by plain products."""
    shape = 8, length, 12, 32  # as a linear layer gives them
    q, k, v, dy = (torch.randn(shape, dtype=dtype).transpose(1, 2) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mask = torch.ones(8, 1, length, length, dtype=torch.bool)

    def run(longest: int) -> None:
        with attending(longest, length):
            F.scaled_dot_product_attention(q, k, v, mask).backward(dy)

    return {"fused": lambda: run(0), "by products": lambda: run(length)}


def packing(out: int, inner: int) -> Mapping[str, Callable[[], Tensor]]:
    """A frozen layer as torch runs it, and with its weight packed."""
    module = nn.Linear(inner, out).requires_grad_(False)
    packed, x = PackedLinear(module, N), torch.randn(N, inner)
    w, b = module.weight, module.bias
    return {"F.linear": lambda: F.linear(x, w, b), "packed": lambda: packed(x)}


def optimizing(shapes: Sequence[tuple[int, int]]) -> Mapping[str, Callable[[], object]]:
    """Clipping and a fused step of AdamW over the factors, and over as many numbers in one."""
    count = sum(rows * columns for rows, columns in shapes)
    return {"tensors": _optimizer(shapes), "flat": _optimizer([(1, count)])}


def _optimizer(shapes: Sequence[tuple[int, int]]) -> Callable[[], object]:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def _row(
    measure: str,
    on: str,
    programs: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = CALLS,
) -> dict[str, Any]:
    def often(program: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                program()

        return run

    seconds = alternate({name: often(p) for name, p in programs.items()}, rounds)
    first, second = seconds.values()
    made = ratio(first, second)
    middle = {n: 1e3 * sorted(s)[len(s) // 2] / calls for n, s in seconds.items()}
    return {
        "measure": measure,
        "on": on,
        "ratio": [made.value, made.low, made.high],
        "milliseconds": middle,
    }
