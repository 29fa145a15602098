"""A frozen linear layer and its updates as one function: x saved once, sums made in place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.errors import RankwiseError
from rankwise.kernels.dropout import draw, gain, new_seed
from rankwise.kernels.eager import is_eager, is_lowered
from rankwise.kernels.recompute import Origin, Recipe, origin_of
from rankwise.kernels.rows import BatchRows
from rankwise.kernels.thin import add_spread, gathered, narrow, spread

__all__ = ["Branch", "Frozen", "adapted_linear", "can_fuse"]


_FEW = 32  # rows


class Frozen(Protocol):
    """A frozen linear layer y = x Wᵀ + b and its gradient dx = dy W, however they are computed."""

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out) of x (..., in), a tensor of its own that may be written into."""
        ...

    def backward(self, dy: Tensor) -> Tensor:
        """dy W (rows, in) of dy (rows, out), a tensor of its own that may be written into."""
        ...

    def saved(self) -> Tensor:
        """W (out, in), kept for ``backward`` so that autograd notices when it is written."""
        ...


def can_fuse(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`adapted_linear` may stand for the plain formula here.

    It may not where x and the weight differ in dtype, under autocast, and where
    :func:`.eager.is_eager` says no.
    """
    return (
        x.dtype is weight.dtype
        and x.dtype.is_floating_point
        and is_eager()
        and not is_lowered(x.device.type)
    )


class Branch(NamedTuple):
    """One low-rank update of a linear layer: s · D(x) Aᵀ Bᵀ, for all outputs or a block of them.

    ``A`` is (r, in) and ``B`` (out, r), or (block, r); ``scale`` is s; ``dropout`` the probability
    of zeroing an input of the branch; ``block`` the first output and the one after the last, or
    None for all; ``rows`` those of a batch that it acts on, or None for all.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0
    block: tuple[int, int] | None = None
    rows: BatchRows | None = None

    def part(self, y: Tensor) -> Tensor:
        """The outputs that this is for, of y (..., out); a view."""
        return y if self.block is None else y[..., slice(*self.block)]

    def taken(self, t: Tensor) -> Tensor:
        """The rows that this acts on, of t (N, ...)."""
        return t if self.rows is None else self.rows.pick(t)

    @property
    def factor(self) -> float:
        """s, times the gain of dropout, which costs nothing there."""
        return self.scale * gain(self.dropout) if self.dropout > 0.0 else self.scale

    def add_spread(self, t: Tensor, thin: Tensor, M: Tensor, mask: Tensor | None = None) -> None:
        """Add factor · thinᵀ M, where a mask spares it, to the rows of t (N, ...), in place."""
        if self.rows is not None and self.rows.run is None:
            change = self.factor * spread(thin, M)
            self.rows.add_(t, change if mask is None else change * mask)
        elif mask is not None:
            self.taken(t).addcmul_(spread(thin, M), mask, value=self.factor)
        else:
            add_spread(self.taken(t), thin, M, self.factor)


def adapted_linear(frozen: Frozen, x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """y = frozen(x) + Σ s · D(x) Aᵀ Bᵀ, the same as the plain formula in :mod:`.formula`.

    Shapes: x (..., in), A (r, in), B (out, r), y (..., out). Backward, with P = D(x) Aᵀ and
    Z = dy B (docs/math.md (6)), where D leaves the gain of dropout to s:

        dA = s · Zᵀ D(x)        dB = s · dyᵀ P        dx = dy W + Σ s · D(Z A)

    Kept for backward: x, which layers that read the same x share, P (N·r), and of dropout a seed;
    where no A trains not even x. Nothing is kept in a wider dtype. Of an x that can be made again
    (:mod:`.recompute`) its origin is kept, which is there anyway.

    A branch for some rows takes those of x, dy and y for all; the frozen layer is computed once for
    the whole batch. x (N, ...) has k rows for each of the batch, N = k · ``rows.of``.

    P and Z are held as (r, N), or in pieces of that (:mod:`.thin`): a CPU's matrix libraries are
    several times slower on products whose result is (N, r) or (out, r) than on the same products
    turned (docs/speed.md).

    Derivatives of derivatives go through the same formulas.
    """
    if not torch.is_grad_enabled():
        if x.numel() <= _FEW * x.shape[-1]:
            if len(branches) == 1 and branches[0].rows is None and branches[0].dropout == 0.0:
                return _few(frozen, x, *branches)
            if all(b.rows is not None and b.dropout == 0.0 for b in branches):
                return _few_by_rows(frozen, x, branches)
        return _sum(frozen, x, branches)[0]
    factors = [factor for branch in branches for factor in (branch.A, branch.B)]
    return _AdaptedLinear.apply(x, frozen, tuple(branches), origin_of(x), *factors)


def _few(frozen: Frozen, x: Tensor, branch: Branch) -> Tensor:
    """y without gradients, for so few rows that the calls cost more than the products."""
    A, B = branch.A, branch.B
    y = frozen.forward(x)
    if A.dtype is not x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    down = F.linear(x.reshape(-1, x.shape[-1]), A)
    branch.part(y.view(-1, y.shape[-1])).addmm_(down, B.T, alpha=branch.scale)
    return y


def _few_by_rows(frozen: Frozen, x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """The same for branches of some rows each: y += (x Aᵀ ∘ M) Bᵀ, with all A and all B in one.

    M (N, Σ r) is s where a row is one of the branch's, and zero elsewhere.
    """
    y = frozen.forward(x)
    rows, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for block in dict.fromkeys(branch.block for branch in branches):
        alike = [branch for branch in branches if branch.block == block]
        A = torch.cat([branch.A for branch in alike]).to(x.dtype)
        B = torch.cat([branch.B for branch in alike], 1).to(x.dtype)
        columns = tuple((branch.rows, branch.A.shape[0], branch.scale) for branch in alike)
        down = F.linear(rows, A).mul_(_scales(columns, len(rows), x.dtype, x.device))
        alike[0].part(sums).addmm_(down, B.T)
    return y


@functools.lru_cache(maxsize=64)
def _scales(
    columns: tuple[tuple[BatchRows, int, float], ...],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """M (count, Σ r) for branches of some rows, r columns and a scale each."""
    wide = torch.promote_types(dtype, torch.float32)
    made = torch.zeros(count, sum(r for _, r, _ in columns), dtype=wide)
    start = 0
    for rows, r, scale in columns:
        own = made[:, start : start + r]
        rows.add_(own, torch.full_like(rows.pick(own), scale))
        start += r
    return made.to(device)


class _Kept(NamedTuple):
    """Of a branch: P, thin, and the inputs that dropout spared, or the seed that tells them."""

    down: Tensor
    mask: Tensor | None
    seed: int | None


def _sum(frozen: Frozen, x: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, list[_Kept]]:
    """y, and what backward needs of each branch."""
    y = frozen.forward(x)
    rows, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    made: list[_Kept] = []
    for branch in branches:
        mask, seed, inputs = None, None, branch.taken(rows)
        if branch.dropout > 0.0:
            seed = new_seed(x.device)
            if seed is None:
                mask = draw(inputs.shape, x.device, branch.dropout, seed)
                inputs = inputs * mask
            else:  # numbers, as a product with bools is slow
                inputs = draw(inputs.shape, x.device, branch.dropout, seed, x.dtype).mul_(inputs)
        down = narrow(branch.A.to(x.dtype), inputs)
        branch.add_spread(branch.part(sums), down, branch.B.to(x.dtype).T)
        made.append(_Kept(down, mask, seed))
    return y, made


_NO_INPUT = (
    "Second derivatives of a layer whose A is frozen need its input, which it does not keep: let A "
    "train, or compute them with the model in torch.func."
)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: Frozen,
        branches: tuple[Branch, ...],
        origin: Origin | None,
        *factors: Tensor,
    ) -> Tensor:
        y, made = _sum(frozen, x, branches)
        need_x, train_A, train_B = _needs(ctx)
        if need_x or any(train_A) or any(train_B):
            kept: list[Tensor | None] = []
            ctx.frozen, ctx.branches, ctx.seeds = frozen, branches, []
            for (down, mask, seed), a, b in zip(made, train_A, train_B, strict=True):
                kept += [down if b else None, mask if need_x or a else None]
                ctx.seeds.append(seed if need_x or a else None)
            ctx.recipe, sources = None, ()
            if origin is not None and any(train_A):
                ctx.recipe, sources = origin
                ctx.recipe.readers += 1
            inputs = x if any(train_A) and ctx.recipe is None else None
            weight = frozen.saved() if need_x else None
            ctx.save_for_backward(inputs, weight, *kept, *factors, *sources)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        if not is_lowered(grad.device.type):
            return _AdaptedLinear._gradients(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):  # as it was in forward
            return _AdaptedLinear._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        branches: tuple[Branch, ...] = ctx.branches
        need_x, train_A, train_B = _needs(ctx)
        x, _, *saved = ctx.saved_tensors  # reading them checks that none was written since
        dy = grad.reshape(-1, grad.shape[-1])
        if ctx.recipe is not None:
            x = _made_again(ctx.recipe, saved[4 * len(branches) :])
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        dx = ctx.frozen.backward(dy) if need_x else None
        found: list[Tensor | None] = []
        for i, branch in enumerate(branches):
            (down, mask), seed = saved[2 * i : 2 * i + 2], ctx.seeds[i]
            A, B = saved[2 * len(branches) + 2 * i :][:2]
            part = branch.taken(branch.part(dy))
            mask = _mask(branch, mask, seed, part)
            up = narrow(B.to(dy.dtype).T, part) if need_x or train_A[i] else None
            if up is not None and dx is not None:
                branch.add_spread(dx, up, A.to(dy.dtype), mask)
            dA = dB = None
            twice = torch.is_grad_enabled()
            again = twice and train_B[i]  # P is then a function of x and A
            inputs = None
            if rows is not None and (train_A[i] or again):
                inputs = _spared(branch.taken(rows), mask, ours=not twice and seed is not None)
            if train_A[i]:
                assert inputs is not None
                assert up is not None
                dA = branch.factor * gathered(up, inputs).to(A.dtype)
            if again:
                if inputs is None:
                    raise RankwiseError(_NO_INPUT)
                down = narrow(A.to(inputs.dtype), inputs)
            if train_B[i]:
                turned = gathered(down, part).T
                dB = branch.factor * turned.to(B.dtype, memory_format=torch.contiguous_format)
            found += [dA, dB]
        if dx is not None:
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
        return dx, None, None, None, *found


def _needs(ctx: Any) -> tuple[bool, tuple[bool, ...], tuple[bool, ...]]:
    """Whether x needs a gradient, and which A and B do."""
    need_x, _, _, _, *factors = ctx.needs_input_grad
    return need_x, tuple(factors[0::2]), tuple(factors[1::2])


def _mask(branch: Branch, kept: Tensor | None, seed: int | None, dy: Tensor) -> Tensor | None:
    """Which inputs dropout spared, for a branch's rows of dy (n, out); None for all."""
    if seed is None:
        return kept
    shape = dy.shape[0], branch.A.shape[1]
    return draw(shape, dy.device, branch.dropout, seed, dy.dtype)


def _spared(inputs: Tensor, mask: Tensor | None, *, ours: bool) -> Tensor:
    """The inputs that dropout spares; a mask that is ours alone is written over."""
    if mask is None:
        return inputs
    return mask.mul_(inputs) if ours else inputs * mask


def _made_again(recipe: Recipe, sources: Sequence[Tensor]) -> Tensor:
    """x, for derivatives of derivatives as a function of what it was made of."""
    return recipe.run(sources) if torch.is_grad_enabled() else recipe.again(sources)[0].detach()
