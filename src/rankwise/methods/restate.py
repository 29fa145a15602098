"""Saying again what an adapter is: a method that names given factors exactly, and plain pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from statistics import mode

from rankwise.lowrank import Factors
from rankwise.methods.adapter import Adapter
from rankwise.methods.lora import LoRA

__all__ = ["exactly", "plain", "restated"]


def restated(method: LoRA, factors: Mapping[str, Factors]) -> LoRA:
    """The method with target_modules, r and α exact for these factors and no others.

    s stays what each of the factors says; α/r is used, whatever the method used before.
    """
    ranks = {name: f.r for name, f in factors.items()}
    alphas = {name: _round(f.scale * f.r) for name, f in factors.items()}
    r, alpha = (
        (mode(ranks.values()), mode(alphas.values())) if factors else (method.r, method.alpha)
    )
    return replace(
        method,
        r=r,
        alpha=alpha,
        rank_stabilized=False,
        target_modules=tuple(exactly(n) for n in factors),
        exclude_modules=(),
        layers=None,
        rank_pattern={exactly(n): k for n, k in ranks.items() if k != r},
        alpha_pattern={exactly(n): a for n, a in alphas.items() if a != alpha},
    )


def plain(adapter: Adapter) -> Adapter:
    """The same updates without starts: each with one becomes its exact pair of rank 2r.

    This is what a file for an untouched base holds. Without starts it is the same adapter.
    """
    if all(f.A0 is None for f in adapter.factors.values()):
        return adapter
    factors = {name: f.pair() for name, f in adapter.factors.items()}
    return replace(adapter, method=restated(adapter.method, factors), factors=factors)


def exactly(name: str) -> str:
    """A pattern that means this name and no other, whatever else a model has."""
    return f"^{re.escape(name)}$"


def _round(alpha: float) -> float:
    """α without the last digits that dividing and multiplying by r left."""
    near = round(alpha)
    return float(near) if math.isclose(alpha, near, rel_tol=1e-12) else alpha
