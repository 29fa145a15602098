"""How far a merged layer may be from the unmerged one by rounding alone, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.layers import LoRAEmbedding, LoRALayer, weight_of
from rankwise.lowrank import Factors

__all__ = ["LayerCheck", "blocks", "check_layer", "roundoff"]

BLOCK = 2**18  # numbers of a weight held in a wider dtype at a time; more would leave the cache
DRAWN = 32  # rows for a layer that the probe does not pass through


@dataclass(frozen=True)
class LayerCheck:
    """One merged layer against the unmerged one.

    Attributes:
        name: of the module.
        error: the largest |merged(x) - unmerged(x)| on the probe rows, both run as they are.
        bound: what rounding may explain at that place, see :func:`output_bound`.
        effect: max |δ x| on the same rows, the update's own size.
        ratio: the largest error / bound of all places; above 1 the layer fails.
        weight_ratio: the largest |W' - (W0 + δ)| / bound of all elements, see :func:`check_weight`.
        update: ‖δ‖ (Frobenius).
        lost: ‖W' - (W0 + δ)‖ / ‖δ‖, the part of the update that rounding W' took: 0 is none.
            As W0 has the dtype of W', 1 means that W' = W0.
        finite: whether every number of W' is finite.
    """

    name: str
    error: float
    bound: float
    effect: float
    ratio: float
    weight_ratio: float
    update: float
    lost: float
    finite: bool

    @property
    def passed(self) -> bool:
        return self.problem() is None

    def problem(self) -> str | None:
        """Why this layer fails, or None."""
        if not self.finite:
            return f"the merged weight of {self.name} is not finite: look at its lora_A and lora_B"
        if not self.weight_ratio <= 1:
            return (
                f"the merged weight of {self.name} is not W0 + δ rounded once (an element is "
                f"{self.weight_ratio:.3g} times as far off as rounding explains)"
            )
        if not self.ratio <= 1:
            return (
                f"the outputs of {self.name} change by up to {self.error:.3g}, "
                f"{self.ratio:.3g} times what rounding explains"
            )
        return None


def roundoff(dtype: torch.dtype) -> float:
    """u, the unit roundoff of rounding to nearest: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def gamma(k: int, u: float) -> float:
    """γ_k = k u / (1 - k u), the bound on k roundings one after another.

    Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition 2002, lemma 3.1. It holds
    for a sum of k products in any order.
    """
    return k * u / (1 - k * u) if k * u < 1 else math.inf


def blocks(layer: LoRALayer) -> Iterator[slice]:
    """Slices of the output features, such that a slice of δ (rows, in) holds few numbers."""
    out_features, in_features = layer.lora_B.shape[0], layer.lora_A.shape[1]
    step = max(1, BLOCK // in_features)
    for start in range(0, out_features, step):
        yield slice(start, start + step)


def check_layer(name: str, layer: LoRALayer, merged: nn.Module, x: Tensor | None) -> LayerCheck:
    """Measure a merged layer on probe rows x (N, in), or ids (N,) for an embedding.

    Without rows, seeded Gaussian ones are drawn (ids at random). No gradients may be on.
    """
    x = _drawn(layer) if x is None else x
    weight_ratio, update, lost, finite = check_weight(layer, weight_of(merged))
    unmerged, changed = layer(x), merged(x)
    bound = output_bound(layer, x, unmerged, changed)
    error = (_wide(changed) - _wide(unmerged)).abs()
    place = int(error.argmax())
    return LayerCheck(
        name=name,
        error=float(error.flatten()[place]),
        bound=float(bound.flatten()[place]),
        effect=float(_on(_wide_factors(layer), x).abs().max()),
        ratio=float((error / bound).max()),
        weight_ratio=weight_ratio,
        update=update,
        lost=lost,
        finite=finite,
    )


def check_weight(layer: LoRALayer, merged: Tensor) -> tuple[float, float, float, bool]:
    """Compare every element of W' with W0 + δ in float64.

    An honest W' is fl_w(fl_f(W0 + fl_f(s B A))), f being float32 or float64 and w the dtype of W0
    (docs/math.md (7a)):

        |W' - (W0 + δ)|  ≤  (u_w + u_f) |W0 + δ|  +  2 γ_{r+2}(f) s |B| |A|  +  η_w

    with u the unit roundoff, η the smallest number of the dtype, and 1 % for the terms of higher
    order; the second γ pays for the reference itself where f is float64. Element by element this
    is far tighter than any bound on outputs, as no sum over in_features stands in it.

    Returns the largest ratio of the two sides, ‖δ‖, ‖W' - (W0 + δ)‖ / ‖δ‖ and whether W' is finite.
    """
    base = weight_of(layer.base_layer)
    f = torch.promote_types(base.dtype, torch.float32)
    grown, small = roundoff(base.dtype) + roundoff(f), smallest(base.dtype)
    factors = _wide_factors(layer)
    carried = 2 * gamma(factors.r + 2, roundoff(f))
    ratio, missing, added, finite = 0.0, 0.0, 0.0, True
    for rows in blocks(layer):
        delta = _some(factors, rows).delta()
        wanted = _matrix(layer, base, rows) + delta
        found = _matrix(layer, merged, rows)
        off = (found - wanted).abs()
        size = _some(_magnitude(factors), rows).delta()
        bound = 1.01 * (grown * wanted.abs() + carried * size) + small
        worst = float((off / bound).max())
        ratio = worst if math.isnan(worst) else max(ratio, worst)
        missing += float(off.square().sum())
        added += float(delta.square().sum())
        finite = finite and bool(found.isfinite().all())
        if math.isnan(ratio):
            break
    lost = math.sqrt(missing / added) if added > 0 else 0.0
    return ratio, math.sqrt(added), lost, finite


def output_bound(layer: LoRALayer, x: Tensor, unmerged: Tensor, merged: Tensor) -> Tensor:
    """What rounding may explain of |merged - unmerged| (N, out), by element; docs/math.md (7b).

    With u the unit roundoff of the layer's dtype a, γ that of the dtype in which products are
    summed (float32; float64 for float64), n = in (1 for an embedding, which sums nothing) and

        M = |W0| |x| + |bias|        D = s |B| |A| |x|        S = M + D

    the unmerged layer rounds its base output (u M, summed: γ_{n+1} M), then A, B, A x and s B A x
    (4 u D, summed: γ_{n+r+2} D) and the result (u |y|); the merged one rounds W' (u (M + D) and
    γ_{r+2} D), sums (γ_{n+1} S) and rounds the result (u |y'|). Together

        |y' - y|  ≤  2 u S  +  4 u D  +  3 γ_{n+r+4} S  +  u (|y| + |y'|)  +  underflow

    times 1.01 + 8 u for the terms of higher order. Underflow is η, the smallest number of a, times
    what an error of η in W', A, B, A x or the result is multiplied by. Worst cases add up here, so
    an honest merge comes to a small part of it. Sources: Higham 2002, sections 3.1 and 3.5.
    """
    dtype = unmerged.dtype
    u = max(roundoff(dtype), roundoff(weight_of(layer.base_layer).dtype))
    summed = roundoff(torch.promote_types(dtype, torch.float32))
    factors = _magnitude(_wide_factors(layer))
    looked_up = isinstance(layer, LoRAEmbedding)
    n = 1 if looked_up else factors.in_features
    sizes = x if looked_up else _wide(x).abs()
    low = _on(factors, sizes)
    every = _base_magnitude(layer, sizes) + low
    result = _wide(unmerged).abs() + _wide(merged).abs()
    through_b = factors.scale * factors.B.sum(1)
    row_sum = Factors(factors.A, torch.ones_like(factors.B[:1]), factors.scale)
    lengths = 1.0 if looked_up else sizes.sum(1, keepdim=True)
    underflow = smallest(dtype) * ((1 + lengths) * (1 + through_b) + _on(row_sum, sizes) + 4)
    whole = (2 * u + 3 * gamma(n + factors.r + 4, summed)) * every + 4 * u * low + u * result
    return (1.01 + 8 * u) * whole + underflow


def smallest(dtype: torch.dtype) -> float:
    """η: the error of a result too small for the dtype's full precision.

    The smallest subnormal in float16; elsewhere the smallest normal number, as a processor may
    flush what lies below to zero.
    """
    numbers = torch.finfo(dtype)
    return numbers.smallest_normal * (numbers.eps if dtype is torch.float16 else 1)


def _base_magnitude(layer: LoRALayer, sizes: Tensor) -> Tensor:
    """|W0| |x| + |bias|, (N, out) in float64."""
    base = weight_of(layer.base_layer)
    if isinstance(layer, LoRAEmbedding):
        return _wide(base[sizes]).abs()
    parts = [sizes @ _matrix(layer, base, rows).abs().T for rows in blocks(layer)]
    bias = dict(layer.base_layer.named_parameters(recurse=False)).get("bias")
    product = torch.cat(parts, dim=1)
    return product if bias is None else product + _wide(bias).abs()


def _matrix(layer: LoRALayer, weight: Tensor, rows: slice) -> Tensor:
    """Some rows of a stored weight as (out, in), in float64."""
    return _wide((weight.T if layer.transposed else weight)[rows])


def _on(factors: Factors, x: Tensor) -> Tensor:
    """δ x (N, out) for rows x (N, in), or the columns of δ for ids x (N,)."""
    if x.is_floating_point():
        return factors.apply(_wide(x))
    return Factors(factors.A[:, x.to(factors.A.device)], factors.B, factors.scale).delta().T


def _some(factors: Factors, rows: slice) -> Factors:
    return Factors(factors.A, factors.B[rows], factors.scale)


def _magnitude(factors: Factors) -> Factors:
    return Factors(factors.A.abs(), factors.B.abs(), factors.scale)


def _wide_factors(layer: LoRALayer) -> Factors:
    factors = layer.factors()
    return Factors(_wide(factors.A), _wide(factors.B), factors.scale)


def _wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has no float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _drawn(layer: LoRALayer) -> Tensor:
    """Probe rows for a layer that the probe did not pass through: N(0, 1), or ids at random."""
    generator = torch.Generator().manual_seed(0)
    weight, in_features = weight_of(layer.base_layer), layer.lora_A.shape[1]
    if isinstance(layer, LoRAEmbedding):
        return torch.randint(in_features, (DRAWN,), generator=generator).to(weight.device)
    return torch.randn(DRAWN, in_features, generator=generator).to(weight.device, weight.dtype)
