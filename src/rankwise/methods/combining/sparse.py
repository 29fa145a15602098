"""TIES, DARE and magnitude pruning: entries of the updates are dropped before they are summed.

The papers drop entries of what each task changed in the weights, which here is δ = s · B A, and
so does this file. Dropping entries of A and of B apart, as PEFT's "ties", "dare_linear" and
"magnitude_prune" do, drops others: an entry of B A is a sum over all r products, and agreement of
sign between two adapters' A says nothing about their δ, because A may change its sign with B.

Dropping entries needs the dense (out, in) matrix. One weight is done at a time, and of its
matrices a handful are held at once, however many adapters there are. What comes out has a high
rank, so it is cut to the best approximation of rank r, and the error of that is reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from rankwise.errors import UserError, gather
from rankwise.lowrank import Factors, rank_problems
from rankwise.methods.combining.sums import (
    Distance,
    Joined,
    common_dtype,
    distance,
    widest,
)
from rankwise.spectrum import share_problems

__all__ = ["DARE", "TIES", "Magnitude", "Majority"]

_COLUMNS = 4096  # of a dense matrix that are held in float64 at a time

Source = Callable[[], Tensor]
"""Makes one weighted update (out, in), its entries dropped; the same one at each call."""


class Majority(Enum):
    """Which sign an entry gets when the updates disagree."""

    TOTAL = auto()
    """That of the sum: the larger mass wins (the paper's)."""
    FREQUENCY = auto()
    """That of more updates; in a draw, that of the sum."""


@dataclass(frozen=True)
class Magnitude:
    """Σ w_i δ̂_i, where δ̂_i keeps the entries of δ_i that are largest in absolute value.

    Attributes:
        density: share of the entries of each weight that stays, above 0 and at most 1.
        r: rank of the result; None is the largest among the updates.

    Raises:
        UserError: a value makes no sense.
    """

    density: float
    r: int | None = None

    def __post_init__(self) -> None:
        gather(UserError, "Magnitude", [*_problems(self.density, self.r)])

    def join(self, parts: Sequence[Factors], name: str) -> Joined:
        def merge(each: Sequence[Factors], _: str) -> Tensor:
            return _sum([_largest(part, self.density) for part in each])

        return _join(parts, name, self.r, merge)


@dataclass(frozen=True)
class TIES:
    """Trim, elect, merge: the mean of the largest entries over the updates that agree in sign.

    Each update keeps its largest entries; at each place the sign is elected by the weighted
    updates, and the result is the mean of those that have it, zeros not counted. Weights that are
    all λ give the paper's λ · τ, and a negative one votes for the other sign.

    The paper trims over all weights of a model at once, this each weight for itself (as PEFT does).

    Attributes:
        density: share of the entries of each weight that stays, above 0 and at most 1; the paper
            finds 0.2 a good value.
        r: rank of the result; None is the largest among the updates.
        majority: how the sign is elected.

    Source: Yadav et al. 2023, arXiv 2306.01708, section 4.

    Raises:
        UserError: a value makes no sense.
    """

    density: float
    r: int | None = None
    majority: Majority = Majority.TOTAL

    def __post_init__(self) -> None:
        gather(UserError, "TIES", [*_problems(self.density, self.r)])

    def join(self, parts: Sequence[Factors], name: str) -> Joined:
        def merge(each: Sequence[Factors], _: str) -> Tensor:
            return _agreeing([_largest(part, self.density) for part in each], self.majority)

        return _join(parts, name, self.r, merge)


@dataclass(frozen=True)
class DARE:
    """Drop and rescale: each entry of δ_i stays with probability ``density``, divided by it.

    The expected result is the plain sum Σ w_i δ_i. What is dropped depends on the seed, the
    weight's name and the place of the update among those of the weight, and on nothing else.

    Attributes:
        density: probability to stay (1 − p in the paper), above 0 and at most 1.
        seed: 0 or more.
        r: rank of the result; None is the largest among the updates.
        ties: elect signs and take the mean of those that agree, as :class:`TIES` does, in place
            of the sum.

    Source: Yu et al. 2023, arXiv 2311.03099, section 3.

    Raises:
        UserError: a value makes no sense.
    """

    density: float
    seed: int = 0
    r: int | None = None
    ties: bool = False

    def __post_init__(self) -> None:
        problems = [*_problems(self.density, self.r)]
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            problems.append(f"seed must be a whole number of 0 or more, got {self.seed!r}.")
        gather(UserError, "DARE", problems)

    def join(self, parts: Sequence[Factors], name: str) -> Joined:
        def merge(each: Sequence[Factors], weight: str) -> Tensor:
            sources = [
                _survivors(part, self.density, f"{self.seed}:{weight}:{i}")
                for i, part in enumerate(each)
            ]
            return _agreeing(sources, Majority.TOTAL) if self.ties else _sum(sources)

        return _join(parts, name, self.r, merge)


def _problems(density: float, r: int | None) -> Iterable[str]:
    yield from share_problems("density", density)
    yield from rank_problems("r", r, optional=True)


def _join(
    parts: Sequence[Factors],
    name: str,
    r: int | None,
    merge: Callable[[Sequence[Factors], str], Tensor],
) -> Joined:
    """Merge each weight of the parts densely, one after the other, and cut it to rank r."""
    dtype, where = common_dtype(parts), parts[0].A.device
    parts = [
        Factors(p.A.detach().to(where, dtype), p.B.detach().to(where, dtype), p.scale)
        for p in parts
    ]
    k = r or widest(parts)
    bank = parts[0].bank
    if bank is None:
        factors, cut = _cut(merge(parts, name), k)
    else:
        each = [
            _cut(merge([Factors(p.A[e], p.B[e], p.scale) for p in parts], f"{name}[{e}]"), k)
            for e in range(bank)
        ]
        stacked = torch.stack([f.A for f, _ in each]), torch.stack([f.B for f, _ in each])
        factors, cut = Factors(*stacked, 1.0), Distance.over(away for _, away in each)
    return Joined(factors, cut, distance(parts, factors))


def _largest(part: Factors, density: float) -> Source:
    """The entries of one update that are largest in absolute value, as many as the density says."""
    size = part.out_features * part.in_features
    kept = max(1, round(density * size))
    bound = part.delta().abs().flatten().kthvalue(size - kept + 1).values

    def source() -> Tensor:
        delta = part.delta()
        return delta.where(delta.abs() >= bound, 0)

    return source


def _survivors(part: Factors, density: float, seed: str) -> Source:
    """The entries of one update that a coin spares, divided by the probability of that."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")

    def source() -> Tensor:
        coin = torch.Generator().manual_seed(number)
        spared = torch.rand(part.out_features, part.in_features, generator=coin) < density
        return (part.delta() / density).where(spared.to(part.A.device), 0)

    return source


def _sum(sources: Sequence[Source]) -> Tensor:
    total = sources[0]()
    for source in sources[1:]:
        total += source()
    return total


def _agreeing(sources: Sequence[Source], majority: Majority) -> Tensor:
    """At each place the mean of the updates that have the elected sign, 0 where none has it."""
    sign = _sum(sources).sign()
    if majority is Majority.FREQUENCY:
        votes = torch.zeros_like(sign)
        for source in sources:
            votes += source().sign()
        sign = votes.sign().where(votes != 0, sign)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for source in sources:
        delta = source()
        agrees = delta.sign() == sign
        total += delta.where(agrees, 0)
        count += agrees
    return total / count.clamp(min=1)


def _cut(dense: Tensor, k: int) -> tuple[Factors, Distance]:
    """The best approximation of rank k or full rank of a dense matrix, and what it misses.

    With U_k the first k eigenvectors of T Tᵀ, T_k = U_k (U_kᵀ T), which is that of the SVD
    (docs/math.md (5)) and takes a fraction of its time.
    """
    lying = dense.shape[0] <= dense.shape[1]
    wide = dense if lying else dense.mT
    gram = wide.new_zeros(wide.shape[0], wide.shape[0], dtype=torch.float64)
    for columns in wide.split(_COLUMNS, dim=1):
        gram += columns.double() @ columns.double().mT
    left = torch.linalg.eigh(gram).eigenvectors[:, -k:].flip(1)
    right = torch.cat([left.mT @ c.double() for c in wide.split(_COLUMNS, dim=1)], dim=1)
    root = right.norm(dim=1).sqrt()
    left = (left * root).to(dense.dtype)
    right = (right / root.where(root > 0, 1)[:, None]).to(dense.dtype)
    factors = Factors(right, left, 1.0) if lying else Factors(left.mT, right.mT, 1.0)
    factors = Factors(factors.A.contiguous(), factors.B.contiguous(), 1.0)
    missed = dense - factors.delta()
    return factors, Distance(_norm(dense), _norm(missed))


def _norm(dense: Tensor) -> float:
    return float(torch.linalg.vector_norm(dense, dtype=torch.float64))
