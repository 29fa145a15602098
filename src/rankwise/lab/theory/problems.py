"""The linear case: teachers with chosen singular values, their inputs, and the bounds by NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "Matrix",
    "Problem",
    "best_update",
    "excess",
    "sample",
    "slanted",
    "spectra",
    "tail",
    "teacher",
]

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """One linear layer to adapt: W0 is frozen, W* is what the outputs come from.

    The loss of an update δ (out, in) is ‖y − x (W0 + δ)ᵀ‖². Inputs with E[xᵀx] = Σ need no more
    than ``in`` rows to carry their whole expected loss: with x = Σ^{1/2} and y = x W*ᵀ it is
    ‖(Δ* − δ) Σ^{1/2}‖² exactly, Δ* = W* − W0. docs/math.md (5) is the case x = I.

    Attributes:
        name: what it is called in the records.
        x: (in, in), rows of inputs.
        y: (in, out), what they should give.
        W0: (out, in), the frozen weight.
        W: (out, in), the teacher W*.
    """

    name: str
    x: Matrix
    y: Matrix
    W0: Matrix
    W: Matrix

    @property
    def delta(self) -> Matrix:
        """Δ* = W* − W0, the update that would make the layer the teacher."""
        return self.W - self.W0

    @property
    def wanted(self) -> Matrix:
        """y − x W0ᵀ (in, out): what is left for an update to give."""
        return self.y - self.x @ self.W0.T


def spectra(count: int) -> dict[str, Matrix]:
    """Singular values of teachers by the name of their kind, each with Σ σi² = 1, falling.

    Exact rank: a quarter of ``count``, falling evenly to one half, then zero. Power law: 1/i.
    Exponential: e^{−i/5}. Flat: all the same.
    """
    i = np.arange(1, count + 1, dtype=np.float64)
    rank = max(1, count // 4)
    kinds = {
        "exact rank": np.where(i <= rank, 1.0 - 0.5 * (i - 1) / rank, 0.0),
        "power law": 1.0 / i,
        "exponential": np.exp(-i / 5),
        "flat": np.ones(count),
    }
    return {name: values / np.linalg.norm(values) for name, values in kinds.items()}


def teacher(
    name: str,
    values: Matrix,
    out_features: int,
    in_features: int,
    random: np.random.Generator,
    root: Matrix | None = None,
) -> Problem:
    """A problem whose Δ* has these singular values, in directions drawn at random.

    ``root`` is Σ^{1/2} of the inputs; without it they are white, Σ = I.
    """
    left = _directions(out_features, len(values), random)
    right = _directions(in_features, len(values), random)
    W0 = random.standard_normal((out_features, in_features)) / np.sqrt(in_features)
    W = W0 + (left * values) @ right.T
    x = np.eye(in_features) if root is None else root
    return Problem(name, x, x @ W.T, W0, W)


def slanted(in_features: int, ratio: float, random: np.random.Generator) -> Matrix:
    """Σ^{1/2} of inputs that are not alike in all directions.

    Σ has eigenvalues that fall geometrically by ``ratio`` from the first to the last, with mean 1,
    in directions drawn at random.
    """
    values = np.geomspace(1.0, 1.0 / ratio, in_features)
    q = _directions(in_features, in_features, random)
    return np.asarray((q * np.sqrt(values / values.mean())) @ q.T, dtype=np.float64)


def sample(truth: Problem, rows: int, noise: float, random: np.random.Generator) -> Problem:
    """What ``rows`` white inputs with noisy outputs tell of the truth.

    y = x W*ᵀ + noise · N(0, 1), and the loss is the mean over the rows. With the thin QR
    factorisation x = Q R it is ‖Qᵀy − R (W0 + δ)ᵀ‖² / rows and a number that no δ changes, so
    the ``in`` rows of R and Qᵀy stand for all of them.
    """
    out_features, in_features = truth.W.shape
    x = random.standard_normal((rows, in_features))
    y = x @ truth.W.T + noise * random.standard_normal((rows, out_features))
    q, r = np.linalg.qr(x)
    root = np.sqrt(rows)
    return Problem(truth.name, r / root, q.T @ y / root, truth.W0, truth.W)


def tail(matrix: Matrix) -> Sequence[float]:
    """Σ_{i>r} σi² for r = 0, 1, ..., all: the least squared error of any matrix of rank r.

    By NumPy's singular value decomposition. docs/math.md (5).
    """
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return [*np.cumsum(squares[::-1])[::-1].tolist(), 0.0]


def best_update(problem: Problem, r: int) -> Matrix:
    """The update of rank r with the least loss, in closed form: reduced-rank regression.

    Formula: δᵀ = x⁻¹ [x Δᵀ]_r, where [·]_r keeps the r largest singular values and x Δᵀ is what is
    wanted of an update. White inputs make it the truncated singular value decomposition of Δ.
    Source: Izenman 1975, "Reduced-rank regression for the multivariate linear model".
    """
    u, values, vt = np.linalg.svd(problem.wanted, full_matrices=False)
    kept = (u[:, :r] * values[:r]) @ vt[:r]
    return np.asarray(np.linalg.solve(problem.x, kept).T, dtype=np.float64)


def excess(problem: Problem, update: Matrix) -> tuple[float, float]:
    """How far an update is from Δ*: in the expected loss ‖(Δ* − δ) xᵀ‖², and in ‖Δ* − δ‖².

    Training that diverged is infinitely far, or at no number at all.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        gap = problem.delta - update
        return float(np.sum((gap @ problem.x.T) ** 2)), float(np.sum(gap**2))


def _directions(size: int, count: int, random: np.random.Generator) -> Matrix:
    """(size, count) with orthonormal columns."""
    q, _ = np.linalg.qr(random.standard_normal((size, count)))
    return q
