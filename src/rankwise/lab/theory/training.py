"""Gradient training of A and B on linear problems: many at once, each with its own rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rankwise.inits import Kaiming
from rankwise.lab.theory.problems import Problem
from rankwise.lowrank import Factors

__all__ = ["Adam", "Descent", "Method", "State", "Trained", "start", "train"]

State = dict[str, Tensor]


class Method(Protocol):
    """How a gradient becomes a step."""

    def step(self, gradient: Tensor, state: State, count: int) -> Tensor:
        """What is subtracted at a rate of 1; ``state`` is the method's own, ``count`` from 1."""
        ...


@dataclass(frozen=True)
class Descent:
    """Gradient descent: the step is the gradient."""

    def step(self, gradient: Tensor, state: State, count: int) -> Tensor:
        """The gradient itself."""
        return gradient


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def step(self, gradient: Tensor, state: State, count: int) -> Tensor:
        """m̂ / (√v̂ + ε), the running mean over the root of the running mean square."""
        mean = state.setdefault("mean", torch.zeros_like(gradient))
        square = state.setdefault("square", torch.zeros_like(gradient))
        mean.lerp_(gradient, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        size = (square / (1 - self.beta2**count)).sqrt_().add_(self.epsilon)
        return mean / size.mul_(1 - self.beta1**count)


@dataclass(frozen=True)
class Trained:
    """What training made of a bank of E problems.

    Attributes:
        factors: A (E, r, in) and B (E, out, r), as :class:`~rankwise.lowrank.Factors`.
        gradient: (E,), the norm of the last gradient over that of the first.
    """

    factors: Factors
    gradient: Tensor


def start(
    count: int, out_features: int, in_features: int, r: int, scale: float, seed: int
) -> Factors:
    """A bank of ``count`` as every adapter starts: A Kaiming-uniform, B zero, float64."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.empty(count, r, in_features, dtype=torch.float64)
    for one in A:
        Kaiming().draw(one, generator)
    return Factors(A, torch.zeros(count, out_features, r, dtype=torch.float64), scale)


def train(
    problems: Sequence[Problem],
    factors: Factors,
    method: Method,
    rates: Tensor | float,
    steps: int,
    *,
    settle: bool,
) -> Trained:
    """Train A and B on ‖y − x (W0 + δ)ᵀ‖² of each problem, from where ``factors`` stand.

    The problems share nothing: entry e of the bank belongs to ``problems[e]`` alone, and its
    gradients are those it would have if it were trained by itself. W0 is frozen. The gradients
    are autograd's, through :meth:`~rankwise.lowrank.Factors.apply`.

    Args:
        problems: E of them, all of one shape.
        factors: a bank of E; left as it is.
        method: Descent or Adam.
        rates: learning rate, one for all or one for each problem (E,).
        steps: how many.
        settle: let the rate fall to zero along half a cosine, so that training comes to rest.
    """
    x = torch.stack([torch.from_numpy(problem.x) for problem in problems])
    wanted = torch.stack([torch.from_numpy(problem.wanted) for problem in problems])
    rate = torch.as_tensor(rates, dtype=torch.float64).reshape(-1, 1, 1)
    trained = [factors.A.clone().requires_grad_(), factors.B.clone().requires_grad_()]
    current = replace(factors, A=trained[0], B=trained[1])
    states: list[State] = [{}, {}]
    first = last = torch.zeros(len(problems), dtype=torch.float64)
    for step in range(1, steps + 1):
        loss = (wanted - current.apply(x)).square().sum()
        gradients = torch.autograd.grad(loss, trained)
        if step in (1, steps):
            last = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0)
            first = last if step == 1 else first
        share = 0.5 * (1 + math.cos(math.pi * step / steps)) if settle else 1.0
        with torch.no_grad():
            for factor, gradient, state in zip(trained, gradients, states, strict=True):
                factor.sub_(share * rate * method.step(gradient, state, step))
    done = replace(factors, A=trained[0].detach(), B=trained[1].detach())
    return Trained(done, (last / first).sqrt())
