"""How far a merged layer may be from the unmerged one by rounding alone, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.layers import (
    LoRAConv,
    LoRAEmbedding,
    LoRAHost,
    LoRALayer,
    LoRAWrapper,
    Shared,
    TokenRows,
    wide_dtype,
)
from rankwise.merging.blocks import products
from rankwise.merging.sample import Sample, sampled
from rankwise.merging.slabs import Slab, slabs
from rankwise.merging.units import gamma, roundoff, smallest

__all__ = ["LayerCheck", "check_layer", "check_name", "roundoff"]

_ONE = torch.ones(())
_NOTHING = (0.0, 0.0, 0.0, 0.0)
DRAWN = 32  # rows for a layer that the probe does not pass through
FEW = 8  # for one with a large weight


@dataclass(frozen=True)
class LayerCheck:
    """One merged layer against the unmerged one.

    Attributes:
        name: of the module, and behind it the parameter where it is not the weight.
        error: the largest |merged(x) - unmerged(x)| on the probe rows, both run as they are.
        bound: what rounding may explain at that place, see :func:`output_bound`.
        effect: max |δ x| on the same rows, the update's own size.
        ratio: the largest error / bound of all places; above 1 the layer fails.
        weight_ratio: the largest |W' - (W0 + δ)| / bound of all elements, see :func:`check_weight`.
        update: ‖δ‖ (Frobenius).
        lost: ‖W' - (W0 + δ)‖ / ‖δ‖, the part of the update that rounding W' took: 0 is none.
            As W0 has the dtype of W', 1 means that W' = W0.
        finite: whether every number of W' is finite.
        rows: of W', those compared number by number; weight_ratio, lost and, of a linear layer,
            error, bound, effect and ratio are of these. All of them, but in a large weight.
        of: the rows of W' in all.
        sums: the largest |Σ ± (W' - (W0 + δ))| / bound over runs of numbers that cover all of a
            large weight, see :mod:`rankwise.merging.sample`; 0 where every row was compared.
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
    rows: int
    of: int
    sums: float

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
        if not self.sums <= 1:
            return (
                f"the merged weight of {self.name} is not W0 + δ rounded once (a sum over a few "
                f"of its numbers is {self.sums:.3g} times as far off as rounding explains)"
            )
        if not self.ratio <= 1:
            return (
                f"the outputs of {self.name} change by up to {self.error:.3g}, "
                f"{self.ratio:.3g} times what rounding explains"
            )
        return None


def check_name(site: str, parameter: str) -> str:
    """What the check of a parameter is called: by its module, and the parameter unless it is W."""
    return site if parameter == "weight" else f"{site}.{parameter}"


def check_layer(
    site: str,
    layer: LoRALayer,
    parameter: str,
    merged: nn.Module,
    x: Tensor | None,
    sums: float | None = None,
) -> LayerCheck:
    """Measure one merged parameter on probe inputs x: rows (N, in), ids (N,), or images.

    Without them, seeded Gaussian ones are drawn (ids at random). Rows of an embedding that trained
    are looked at whatever the probe holds. A parameter that its owner reads is measured as the
    linear layer that it is a matrix of. Of a large weight a sample of the rows is compared number
    by number, and all of it in sums (:mod:`rankwise.merging.sample`), unless those were made when
    W' was written. No gradients may be on.
    """
    name = check_name(site, parameter)
    sample = sampled(layer, parameter, merged, x, sums)
    if sample is not None:
        return _check_sample(name, layer, parameter, merged, sample, x)
    found: Tensor = getattr(merged, parameter)
    weight_ratio, update, lost, finite = check_weight(layer, parameter, found)
    outputs, rows = _NOTHING, len(found)
    if found.ndim > 1:
        rows = len(_flat(layer, parameter, found))
        x = _with_tokens(layer, _drawn(layer, parameter) if x is None else x)
        unmerged, changed = _runs(layer, parameter, merged, found, x)
        outputs = _compare_outputs(
            unmerged, changed, *output_bound(layer, parameter, x, unmerged, changed)
        )
    return LayerCheck(name, *outputs, weight_ratio, update, lost, finite, rows, rows, 0.0)


def _check_sample(
    name: str,
    layer: LoRALayer,
    parameter: str,
    merged: nn.Module,
    sample: Sample,
    x: Tensor | None,
) -> LayerCheck:
    """The check of a large weight. Linear outputs are computed in float32, and only the sampled."""
    slab = sample.slab
    weight_ratio, _, lost, finite = _compare(layer.base_weight(parameter).dtype, [slab])
    if layer.lookup:
        unmerged = layer(sample.places)
        changed = layer.gained(slab.other.mT.to(unmerged))
        x = torch.arange(len(sample.places))
    else:
        x = _drawn(layer, parameter, FEW) if x is None else x
        unmerged, changed = _some_outputs(layer, parameter, merged, slab, x)
    outputs = _compare_outputs(
        unmerged, changed, *output_bound(layer, parameter, x, unmerged, changed, [slab])
    )
    shares = len(sample.places), sample.of, sample.sums
    return LayerCheck(name, *outputs, weight_ratio, sample.update, lost, finite, *shares)


def _compare_outputs(
    unmerged: Tensor, merged: Tensor, limit: Tensor, effect: float
) -> tuple[float, float, float, float]:
    """error, bound, effect and ratio of a :class:`LayerCheck`."""
    apart = (_wide(merged) - _wide(unmerged)).abs()
    place = int(apart.argmax())
    error, bound = float(apart.flatten()[place]), float(limit.flatten()[place])
    return error, bound, effect, float((apart / limit).max())


def _some_outputs(
    layer: LoRALayer, parameter: str, merged: nn.Module, slab: Slab, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Some outputs of a linear layer, unmerged and merged, in float32 (float64 beside float64)."""
    wide = wide_dtype(layer.base_weight(parameter))
    x = x.to(slab.base.device, wide)
    biases = (layer.bias, merged.bias) if isinstance(layer, LoRAWrapper) else (None, None)
    before, after = (b[slab.rows].to(x) if isinstance(b, Tensor) else None for b in biases)
    unmerged = F.linear(x, slab.base.to(wide), before)
    for pair in products(layer.changes(parameter)):
        A, B = pair.A.to(x), pair.B[slab.rows].to(x)
        unmerged = unmerged + F.linear(F.linear(x, A), B) * pair.scale
    return unmerged, F.linear(x, slab.other.to(wide), after)


def _runs(
    layer: LoRALayer, parameter: str, merged: nn.Module, found: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs of the unmerged layer and of the merged one."""
    if not isinstance(layer, LoRAHost):
        return layer(x), merged(x)
    before, after = (_flat(layer, parameter, w) for w in (layer.effective(parameter), found))
    return F.linear(x, before), F.linear(x, after)


def _flat(layer: LoRALayer, parameter: str, stored: Tensor) -> Tensor:
    """A parameter that its owner reads as (rows, in); the members of a bank one below the other."""
    layout = layer.changes(parameter)[0].layout
    return layout.matrix(stored).flatten(0, -2)


def check_weight(
    layer: LoRALayer, parameter: str, merged: Tensor
) -> tuple[float, float, float, bool]:
    """Compare every element of W' with W0 + δ in float64.

    An honest W' is fl_w(fl_f(W0 + fl_f(δ))), f being float32 or float64 and w the dtype of W0
    (docs/math.md (7a)):

        |W' - (W0 + δ)|  ≤  (u_w + u_f) |W0 + δ|  +  2 γ_K(f) |δ|_sum  +  η_w

    and γ_K(f) |W0| more where w is shorter than f, as the products are then added to W0 one by one;
    with u the unit roundoff, η the smallest number of the dtype, K the roundings on the way to an
    element of δ and |δ|_sum what its terms add up to without their signs (for s B A: K = r + 2 and
    s |B| |A|); 1 % stands for the terms of higher order, and the second γ pays for the reference
    itself where f is float64. Element by element this is far tighter than any bound on outputs,
    as no sum over in_features stands in it.

    Returns the largest ratio of the two sides, ‖δ‖, ‖W' - (W0 + δ)‖ / ‖δ‖ and whether W' is finite.
    """
    return _compare(layer.base_weight(parameter).dtype, slabs(layer, parameter, merged))


def _compare(dtype: torch.dtype, parts: Iterable[Slab]) -> tuple[float, float, float, bool]:
    f = torch.promote_types(dtype, torch.float32)
    grown, small = roundoff(dtype) + roundoff(f), smallest(dtype)
    ratio, missing, added, finite = 0.0, 0.0, 0.0, True
    for slab in parts:
        wanted = slab.base + slab.delta
        off = (slab.other - wanted).abs()
        carried = 2 * gamma(slab.roundings, roundoff(f))
        bound = 1.01 * (grown * wanted.abs() + carried * slab.size) + small
        if f != dtype:  # the sum may begin with W0
            bound = bound + gamma(slab.roundings, roundoff(f)) * slab.base.abs()
        worst = float((off / bound).max())
        ratio = worst if math.isnan(worst) else max(ratio, worst)
        missing += float(off.square().sum())
        added += float(slab.delta.square().sum())
        finite = finite and bool(slab.other.isfinite().all())
        if math.isnan(ratio):
            break
    lost = math.sqrt(missing / added) if added > 0 else 0.0
    return ratio, math.sqrt(added), lost, finite


def output_bound(
    layer: LoRALayer,
    parameter: str,
    x: Tensor,
    unmerged: Tensor,
    merged: Tensor,
    parts: Iterable[Slab] | None = None,
) -> tuple[Tensor, float]:
    """What rounding explains of |merged - unmerged| by element, and max |δ x|; docs/math.md (7b).

    With u the unit roundoff of the layer's dtype a, γ that of the dtype in which products are
    summed (float32; float64 for float64 outputs), n = in (1 for an embedding, which sums nothing),
    K the roundings on the way to an element of δ, and

        M = |W0| |x| + |bias|        D = |δ|_sum |x|        S = M + D

    the unmerged layer rounds its base output (u M, summed: γ_{n+1} M), then A, B, A x and s B A x
    (4 u D, summed: γ_{n+K} D) and the result (u |y|); the merged one rounds W' (u (M + D) and
    γ_K D), sums (γ_{n+1} S) and rounds the result (u |y'|). Together

        |y' - y|  ≤  2 u S  +  4 u D  +  3 γ_{n+K+2} S  +  u (|y| + |y'|)  +  underflow

    times 1.01 + 8 u for the terms of higher order. Underflow is η, the smallest number of a, times
    what an error of η in W', A, B, A x or the result is multiplied by. Worst cases add up here, so
    an honest merge comes to a small part of it. Sources: Higham 2002, sections 3.1 and 3.5.

    ``parts`` are the rows of W (the ids of an embedding) that were run, all of them if None.
    """
    dtype = unmerged.dtype
    u = max(roundoff(dtype), roundoff(layer.base_weight(parameter).dtype))
    summed = roundoff(torch.promote_types(dtype, torch.float32))
    looked_up = isinstance(layer, LoRAEmbedding)
    sizes = x if looked_up else _wide(x).abs()
    every: list[Tensor] = []
    low: list[Tensor] = []
    largest, through, roundings, terms = 0.0, 0.0, 0, 1
    for slab in slabs(layer, parameter) if parts is None else parts:
        low.append(_on(layer, slab.size, sizes, slab))
        plain = _on(layer, slab.base.abs(), sizes, slab)
        bias = layer.bias if isinstance(layer, LoRAWrapper) else None
        every.append(
            plain if bias is None else plain + layer.channels(_wide(bias[slab.rows]).abs())
        )
        largest = max(
            largest, float(_on(layer, slab.delta, x if looked_up else _wide(x), slab).abs().max())
        )
        through, roundings = max(through, slab.through), max(roundings, slab.roundings)
        terms = 1 if looked_up else slab.base.shape[-1]
    carried, whole = torch.cat(low, -1), torch.cat(every, -1)  # a convolution comes in one piece
    total = whole + carried
    result = _wide(unmerged).abs() + _wide(merged).abs()
    length = float(layer.gained(_ONE).abs()) if looked_up else float(sizes.abs().max()) * terms
    underflow = smallest(dtype) * (2 + length) * (2 + through) * 2
    sums = 3 * gamma(terms + roundings + 2, summed)
    plain = (2 * u + sums) * total + 4 * u * carried + u * result
    return (1.01 + 8 * u) * plain + underflow, largest


def _on(layer: LoRALayer, matrix: Tensor, x: Tensor, slab: Slab) -> Tensor:
    """The layer's linear function with another weight, given as rows of its matrix.

    Of an embedding it is its absolute value, whatever constant it multiplies its rows with.
    """
    if isinstance(layer, LoRAEmbedding):
        return layer.gained(matrix.T[x.to(matrix.device)]).abs()
    if isinstance(layer, LoRAConv):
        weight = matrix.view(layer.base_layer.weight.shape)
        return layer.base_layer._conv_forward(x, weight, None)  # type: ignore[operator]
    return F.linear(x, matrix.flatten(0, -2) if slab.bank else matrix)


def _wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has no float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _with_tokens(layer: LoRALayer, x: Tensor) -> Tensor:
    """The inputs of a layer; of an embedding also the ids of the rows that trained."""
    if not isinstance(layer, LoRAEmbedding):
        return x
    sources = (u.source if isinstance(u, Shared) else u for u in layer.live())
    ids = [u.ids.to(x) for u in sources if isinstance(u, TokenRows)]
    return torch.cat([x.flatten(), *ids])


def _drawn(layer: LoRALayer, parameter: str, count: int = DRAWN) -> Tensor:
    """Probe inputs for a layer that the probe did not pass through: N(0, 1), or ids at random."""
    generator = torch.Generator().manual_seed(0)
    weight = layer.base_weight(parameter)
    layout = layer.changes(parameter)[0].layout
    if isinstance(layer, LoRAEmbedding):
        return torch.randint(layout.in_features, (DRAWN,), generator=generator).to(weight.device)
    size: tuple[int, ...] = (count, layout.in_features)
    if isinstance(layer, LoRAConv):
        conv = layer.base_layer
        fill = [0] * len(conv.kernel_size) if isinstance(conv.padding, str) else conv.padding
        sides = zip(conv.kernel_size, conv.dilation, fill, strict=True)
        size = (2, conv.in_channels, *(2 * d * (k - 1) + p + 2 for k, d, p in sides))
    return torch.randn(size, generator=generator).to(weight.device, weight.dtype)
