"""What trains beside a frozen weight: low-rank updates, offsets of biases, rows of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import UserError
from rankwise.inits import Place, Start
from rankwise.kernels import Branch
from rankwise.layers.layout import Layout
from rankwise.layers.part import Part
from rankwise.layers.spec import Spec, Switch
from rankwise.lowrank import Factors

if TYPE_CHECKING:
    from rankwise.layers.layer import LoRALayer

__all__ = ["Change", "LowRank", "Offset", "Shared", "TokenRows", "Update", "place_of", "wide_dtype"]


class Update(nn.Module, ABC):
    """What trains beside one frozen layer and changes its outputs; it belongs to one adapter.

    Attributes:
        switch: whether the adapter acts, shared by all of its updates.
        barrier: why no weight can hold it, so that it cannot be merged; empty where one can.
    """

    switch: Switch
    barrier: ClassVar[str] = ""

    @abstractmethod
    def add(self, y: Tensor, x: Tensor, plain: Tensor, layer: LoRALayer) -> Tensor:
        """y plus what this update adds to the layer's output.

        ``x`` is the layer's input and ``plain`` what the frozen layer makes of it.
        """

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that train."""
        return iter(self.parameters())

    def fused(self) -> Branch | None:
        """What :func:`rankwise.kernels.adapted_linear` takes of it; None where it is more."""
        return None


class Change(Update, ABC):
    """An update that is a change of one frozen parameter, so that W0 + δ holds it.

    Attributes:
        layout: which parameter of the layer, and which rows of it.
    """

    layout: Layout

    @abstractmethod
    def dense(self, layer: LoRALayer) -> Tensor:
        """δ of its rows as (out, in), (E, out, in) or (out,), in its parameters' dtype."""


class LowRank(Change):
    """δ = s · (B A − B0 A0), and with DoRA W' = m ∘ (W0 + δ) / ‖W0 + δ‖ row by row.

    ``lora_A`` (r, in) and ``lora_B`` (out, r) are parameters, in float32 (float64 on a float64
    base) whatever the frozen layer's dtype; a bank has (E, r, in) and (E, out, r). ``start_A`` and
    ``start_B`` are the frozen A0 and B0, or None. ``magnitude`` (out,) is DoRA's m, or None.

    Step 0 is the base bit for bit: with B zero nothing is added; with a start the differences
    A − A0 and B − B0, with which δ is computed, are zero; with DoRA m / ‖W0 + δ‖ is one.

    Sources: Hu et al. 2021, arXiv 2106.09685, section 4.1; Liu et al. 2024, arXiv 2402.09353,
    sections 4.1 and 4.3 (the norm is a constant for the gradient); docs/math.md (1), (8).
    """

    spec: Spec
    rows: Part | None
    scale: float | Tensor
    start_A: Tensor | None
    start_B: Tensor | None
    magnitude: nn.Parameter | None

    def __init__(self, spec: Spec, start: Start, layout: Layout, switch: Switch) -> None:
        super().__init__()
        # into the object's table: nn.Module asks of every attribute whether it is a tensor
        vars(self).update(spec=spec, layout=layout, switch=switch, scale=spec.scale)
        self.rows = None if layout.rows is None else Part(layout.rows, start.A.device)
        self.lora_A = nn.Parameter(_padded(start.A, spec.slot, -2), requires_grad=not spec.freeze_A)
        self.lora_B = nn.Parameter(_padded(start.B, spec.slot, -1))
        frozen = (self.lora_A, self.lora_B) if start.subtract else (None, None)
        self.register_buffer("start_A", None if frozen[0] is None else frozen[0].detach().clone())
        self.register_buffer("start_B", None if frozen[1] is None else frozen[1].detach().clone())
        self.register_parameter("magnitude", None)
        if spec.slot is not None:
            del self.scale
            self.register_buffer("scale", torch.tensor(spec.scale, device=start.A.device))

    def trained(self) -> Iterator[nn.Parameter]:
        """B, A unless it is frozen, and the magnitude."""
        if not self.spec.freeze_A:
            yield self.lora_A
        yield self.lora_B
        if self.magnitude is not None:
            yield self.magnitude

    def factors(self) -> Factors:
        """A, B, s and the start; the tensors are the live ones, not copies."""
        return Factors(self.lora_A, self.lora_B, float(self.scale), self.start_A, self.start_B)

    def measure(self, layer: LoRALayer) -> None:
        """Give DoRA its magnitude: the norms of the rows as they are now, ‖W0 + δ‖."""
        self.magnitude = nn.Parameter(self._norm(layer).clone())

    def add(self, y: Tensor, x: Tensor, plain: Tensor, layer: LoRALayer) -> Tensor:
        dropout = self.spec.dropout if self.training and not layer.lookup else 0.0
        A, B = self.both()
        simple = self.magnitude is None and self.rows is None
        if simple and isinstance(self.scale, float):
            return layer.add_branch(y, x, A, B, self.scale, dropout)
        change = layer.branch(F.dropout(x, dropout) if dropout > 0 else x, A, B) * self.scale
        if self.magnitude is not None:
            gain = layer.channels(self.magnitude / self._norm(layer))
            direct = layer.without_bias(plain)
            if self.rows is not None:
                direct = self.rows.pick(direct, -1)
            change = ((gain - 1) * direct + gain * change).to(y.dtype)
        return y + change if self.rows is None else self.rows.add(y, change, -1)

    def fused(self) -> Branch | None:
        """A and B, s, dropout and the block of outputs, where that is all.

        It is asked at every call, so it reads the module's own tables, as attributes of modules
        are found only after a search.
        """
        held, scale, rows = self._parameters, vars(self).get("scale"), self._modules.get("rows")
        block = rows.block if isinstance(rows, Part) else None
        if held["magnitude"] is not None or scale is None or (rows is not None and block is None):
            return None
        A, B = held["lora_A"], held["lora_B"]
        if A is None or B is None or self._buffers["start_A"] is not None:
            A, B = self.both()
        switch, dropout = self.switch, self.spec.dropout if self.training else 0.0
        some = None if switch.routing is None else switch.routing.by_adapter[switch.adapter]
        return Branch(A, B, scale, dropout, block, some)

    def dense(self, layer: LoRALayer) -> Tensor:
        delta = self.factors().delta()
        if self.magnitude is None:
            return delta
        base = self.layout.cut(self.layout.matrix(layer.base_weight(self.layout.parameter)))
        wide = base.to(delta.dtype)
        gain = (self.magnitude / self._norm(layer))[..., None]
        return (gain - 1) * wide + gain * delta

    def both(self) -> tuple[Tensor, Tensor]:
        """The A and B to multiply with: with a start [A; A − A0] and [B − B0, B0]."""
        if self.start_A is None:
            return self.lora_A, self.lora_B
        near = self.factors().conditioned()
        return near.A, near.B

    def _norm(self, layer: LoRALayer) -> Tensor:
        """‖W0 + δ‖ of each row, (out,), a constant for the gradient."""
        with torch.no_grad(), _no_autocast(self.lora_B):
            base = self.layout.cut(self.layout.matrix(layer.base_weight(self.layout.parameter)))
            delta = self.factors().delta()
            norm = torch.linalg.vector_norm(base.to(delta.dtype) + delta, dim=-1)
            return norm.clamp_min(torch.finfo(norm.dtype).tiny)  # a row of zeros stays one

    def extra_repr(self) -> str:
        s = self.spec
        form = "alpha/sqrt(r)" if s.rank_stabilized else "alpha/r"
        more = (", dora" if s.dora else "") + (", A frozen" if s.freeze_A else "")
        return (
            f"r={s.r}, alpha={s.alpha:g}, scale={float(self.scale):g} ({form}), "
            f"dropout={s.dropout:g}{more}"
        )


class Shared(Change):
    """The update of a weight that a second layer holds as well, such as a tied output layer.

    It has no parameters of its own, so the two layers stay tied: in training, in the merged
    weight, and in the file. Where one of them is an embedding and the other a linear layer, which
    read the same stored weight the other way round, it adds δᵀ.
    """

    def __init__(self, source: LowRank | TokenRows, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.switch = source.switch
        object.__setattr__(self, "_source", source)  # not a submodule: it is one already elsewhere

    @property
    def source(self) -> LowRank | TokenRows:
        """The update whose parameters these are."""
        return vars(self)["_source"]

    @property
    def turned(self) -> bool:
        """Whether this layer reads the stored weight the other way round."""
        return self.layout.transposed != self.source.layout.transposed

    def add(self, y: Tensor, x: Tensor, plain: Tensor, layer: LoRALayer) -> Tensor:
        source = self.source
        if not self.turned:
            return source.add(y, x, plain, layer)
        if isinstance(source, TokenRows):
            rows = F.linear(x, source.token_delta.to(x.dtype))
            return y.index_add(-1, source.ids, rows.to(y.dtype))
        A, B = source.both()
        change = layer.branch(x, B.T, A.T)
        return y + (change * source.scale).to(y.dtype)

    def dense(self, layer: LoRALayer) -> Tensor:
        delta = self.source.dense(layer)
        return delta.mT if self.turned else delta


class TokenRows(Change):
    """New values for some rows of an embedding, the other rows frozen: y = W0ᵀ[i] + d_i.

    ``token_delta`` (n, dim) is what is added to the rows of ``ids`` (n,); it starts at zero.
    """

    ids: Tensor

    def __init__(self, ids: tuple[int, ...], delta: Tensor, layout: Layout, switch: Switch) -> None:
        super().__init__()
        num = layout.in_features
        wrong = [i for i in ids if not 0 <= i < num]
        if wrong or len(set(ids)) < len(ids):
            raise UserError(
                f"Token ids must be different whole numbers from 0 to {num - 1}, got {ids}."
            )
        self.layout = layout
        self.switch = switch
        self.token_delta = nn.Parameter(delta)
        self.register_buffer("ids", torch.tensor(ids, device=delta.device))

    def add(self, y: Tensor, x: Tensor, plain: Tensor, layer: LoRALayer) -> Tensor:
        table = F.pad(self.token_delta, (0, 0, 0, 1))  # a last row of zeros, for all other tokens
        known, order = self.ids.sort()
        near = torch.searchsorted(known, x.contiguous()).clamp(max=len(known) - 1)
        rows = torch.where(known[near] == x, order[near], len(known))
        return y + layer.gained(F.embedding(rows, table)).to(y.dtype)

    def dense(self, layer: LoRALayer) -> Tensor:
        zeros = self.token_delta.new_zeros(self.layout.in_features, self.layout.out_features)
        return zeros.index_add(0, self.ids, self.token_delta).T


class Offset(Change):
    """A trained vector, mostly a bias: b = b0 + d. ``offset`` (out,) is d; it starts at zero."""

    def __init__(self, layout: Layout, switch: Switch, offset: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.switch = switch
        self.offset = nn.Parameter(offset)

    def add(self, y: Tensor, x: Tensor, plain: Tensor, layer: LoRALayer) -> Tensor:
        return y + layer.channels(self.offset).to(y.dtype)

    def dense(self, layer: LoRALayer) -> Tensor:
        return self.offset


def place_of(layer: LoRALayer, layout: Layout, spec: Spec, name: str) -> Place:
    """What a start may know of the weight it is for."""
    stored = layer.stored_weight(layout.parameter)
    return Place(
        name=name,
        module=layer.base_layer,
        weight=lambda: layout.cut(layout.matrix(layer.base_weight(layout.parameter))),
        out_features=layout.out_features,
        in_features=layout.in_features,
        r=spec.r,
        scale=spec.scale,
        dtype=wide_dtype(stored),
        device=stored.device,
        lookup=layer.lookup,
        bank=layout.experts,
        rows=layout.rows,
    )


def wide_dtype(stored: Tensor) -> torch.dtype:
    """The dtype in which what trains is held: float32, or float64 beside a float64 weight."""
    is_float = stored.dtype.is_floating_point
    return torch.promote_types(stored.dtype, torch.float32) if is_float else torch.float32


def _padded(factor: Tensor, slot: int | None, axis: int) -> Tensor:
    """The factor with zeros behind its r rows or columns up to the size of the slot."""
    if slot is None or slot == factor.shape[axis]:
        return factor
    if slot < factor.shape[axis]:
        raise UserError(f"A slot of rank {slot} cannot hold rank {factor.shape[axis]}.")
    missing = slot - factor.shape[axis]
    return F.pad(factor, (0, 0, 0, missing) if axis == -2 else (0, missing))


def _no_autocast(tensor: Tensor):
    kind = tensor.device.type
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind if known else "cpu", enabled=False)
