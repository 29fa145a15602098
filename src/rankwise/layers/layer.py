"""A frozen layer plus its updates: LoRALinear, LoRAEmbedding, LoRAConv; .weight tells the truth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from rankwise.errors import UserError
from rankwise.kernels import (
    Branch,
    adapted_linear,
    add_delta_embedding,
    add_delta_linear,
    branch_embedding,
    branch_linear,
    can_fuse,
)
from rankwise.layers.alike import embedding_gain
from rankwise.layers.frozen import dense_weight, is_quantized, logical_shape, own_parameter
from rankwise.layers.fusing import frozen_linear
from rankwise.layers.layout import layout_of
from rankwise.layers.rows import Routing, RowsDiffer
from rankwise.layers.update import Change, LowRank, Offset, Update, wide_dtype

__all__ = [
    "LoRAConv",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAWrapper",
    "has_bias",
]


class LoRALayer(nn.Module, ABC):
    """A frozen layer and the trained updates beside it: y = base(x) + Σ δ_i(x).

    ``base_layer`` is the untouched original module and ``updates`` the changes of its parameters,
    by the name of the adapter they belong to (:class:`Update`); those whose adapter is switched on
    add up. Owners that never call ``forward`` but read ``.weight``, as nn.MultiheadAttention and
    the fast path of nn.TransformerEncoderLayer do, get W0 + Σ δ_i, differentiable.

    Where the rows of a batch go through different adapters (:class:`Routing`), each row gets the
    updates of its own: y_i = base(x)_i + Σ δ_i(x_i), with the frozen layer run once on all rows.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; docs/math.md (1).
    """

    base_layer: nn.Module
    updates: nn.ModuleDict
    lookup = False  # whether the input is row numbers

    def live(self) -> list[Update]:
        """The updates whose adapter is switched on, in the order they were attached."""
        updates = self._modules["updates"]  # faster than the attribute, and asked at every call
        assert updates is not None
        return [u for u in vars(updates)["_modules"].values() if u.switch.on]

    def changes(self, parameter: str) -> list[Change]:
        """The live changes of one parameter of the base."""
        live = (u for u in self.live() if isinstance(u, Change))
        return [u for u in live if u.layout.parameter == parameter]

    @property
    def update(self) -> LowRank:
        """The one low-rank update of this layer.

        Raises:
            UserError: there is none, or there are several; ``updates`` has them by name.
        """
        found = [u for u in self.updates.values() if isinstance(u, LowRank)]
        if len(found) != 1:
            raise UserError(
                f"This layer has {len(found)} low-rank updates ({', '.join(self.updates)}); name "
                "one: layer.updates[name]."
            )
        return found[0]

    def stored_weight(self, parameter: str) -> Tensor:
        """A parameter of the base as it is stored, frozen."""
        found = own_parameter(self.base_layer, parameter)
        return getattr(self.base_layer, parameter) if found is None else found

    def base_weight(self, parameter: str) -> Tensor:
        """A parameter of the base as a dense tensor, detached; of a quantised one what it means."""
        if parameter == "weight":
            return dense_weight(self.base_layer)
        return self.stored_weight(parameter).detach()

    def effective(self, parameter: str) -> Tensor:
        """A parameter in force: W0 + Σ δ_i in the base's own layout, rounded once to its dtype.

        Where the rows of a batch go through different adapters it is not one tensor: what is given
        then has its shape and raises a UserError when it is computed with.
        """
        changes = self.changes(parameter)
        if changes and changes[0].switch.routing is not None:
            return RowsDiffer.of(self.stored_weight(parameter))
        return self.changed(parameter, changes)

    def changed(self, parameter: str, changes: Sequence[Change]) -> Tensor:
        """W0 + Σ δ_i over these changes, rounded once to the dtype of W0."""
        if not changes and not is_quantized(self.base_layer):
            return self.stored_weight(parameter)
        base = self.base_weight(parameter)
        wide = base.to(wide_dtype(base))
        if base.ndim == 1:
            total = wide
            for update in changes:
                total = total + update.dense(self)
            return total.to(base.dtype)
        if not changes:
            return base
        layout = changes[0].layout
        matrix = layout.matrix(wide)
        for update in changes:
            delta = update.dense(self).to(wide.dtype)  # autocast may have lowered it
            part = update.rows if isinstance(update, LowRank) else None
            matrix = matrix + delta if part is None else part.add(matrix, delta, -2)
        return layout.stored(matrix).to(base.dtype)

    def adapted(self) -> list[str]:
        """The parameters of the base that have a live change."""
        live = (u for u in self.live() if isinstance(u, Change))
        return list(dict.fromkeys(u.layout.parameter for u in live))

    @abstractmethod
    def branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B A x in the layer's own geometry, for A (r, in) and B (out, r)."""

    def add_branch(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """y + s · B A D(x), with dropout of this probability on x."""
        x = F.dropout(x, dropout) if dropout > 0 else x
        return y + (self.branch(x, A, B) * scale).to(y.dtype)

    def with_updates(self, plain: Tensor, x: Tensor, updates: Sequence[Update]) -> Tensor:
        """What the frozen layer made of x, and what these updates add to it, to all or their rows.

        Raises:
            UserError: the rows go different ways and x is not of so many.
        """
        routing = updates[0].switch.routing if updates else None
        if routing is None:
            return self._with(plain, x, updates)
        self.fit_rows(routing, x)
        parts: list[Tensor] = []
        for way, rows in routing.rows.items():
            own = [u for u in updates if u.switch.adapter in way]
            parts.append(self._with(rows.pick(plain), rows.pick(x), own))
        return routing.join(parts)

    def _with(self, plain: Tensor, x: Tensor, updates: Sequence[Update]) -> Tensor:
        y = plain
        for update in updates:
            y = update.add(y, x, plain, self)
        return y

    def routes(self, parameter: str | None) -> bool:
        """Whether the rows of a batch can each have updates of their own for this parameter, or,
        with None, for what the layer does.
        """
        return True

    def fit_rows(self, routing: Routing, x: Tensor) -> None:
        """See to it that x has the rows that are routed; see :meth:`Groups.fit`."""
        base = self.base_layer
        who = f"{type(base).__name__} of weight {logical_shape(base)}"
        routing.fit(x.shape, self.position_axes, who)

    @property
    def position_axes(self) -> int:
        """How many of the last axes of an input are one position's, or one picture's."""
        return 0 if self.lookup else len(logical_shape(self.base_layer)) - 1

    def channels(self, values: Tensor) -> Tensor:
        """One value for each output (out,), in a shape that spreads over the layer's outputs."""
        return values

    def gained(self, change: Tensor) -> Tensor:
        """What a change of rows of the weight is at the output; an embedding may scale its rows."""
        return change

    def without_bias(self, plain: Tensor) -> Tensor:
        """What the frozen layer gave, less its bias."""
        bias = getattr(self.base_layer, "bias", None)  # which may be computed from other tensors
        if not isinstance(bias, Tensor):
            return plain
        return plain - self.channels(bias.detach()).to(plain.dtype)


class LoRAWrapper(LoRALayer, ABC):
    """A layer around another one, in whose place it hangs."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.updates = nn.ModuleDict()
        self.training = base_layer.training
        self.updates.training = self.training

    @property
    def weight(self) -> Tensor:
        """The weight in force, W0 + Σ δ_i, in the base's own orientation."""
        return self.effective("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias in force, or None."""
        if has_bias(self.base_layer):
            return self.effective("bias")
        changes = self.changes("bias")
        if changes and changes[0].switch.routing is not None:
            return RowsDiffer.of(changes[0].dense(self))
        return torch.stack([u.dense(self) for u in changes]).sum(0) if changes else None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, used by keyword
        return self.with_updates(self.base_layer(input), input, self.live())


class LoRALinear(LoRAWrapper):
    """nn.Linear, a quantised one, or transformers' Conv1D: y = base(x) + Σ s · D(x) Aᵀ Bᵀ.

    Shapes: x (..., in), y (..., out), A (r, in), B (out, r). A starts random, B zero, unless the
    start is another. The weight of nn.Linear is (out, in); Conv1D stores (in, out).
    """

    @property
    def in_features(self) -> int:
        return layout_of(self.base_layer).in_features

    @property
    def out_features(self) -> int:
        return layout_of(self.base_layer).out_features

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, used by keyword
        if input.is_nested:
            raise UserError(
                "An adapted linear layer was given a nested tensor and takes padded batches: build "
                "nn.TransformerEncoder with enable_nested_tensor=False."
            )
        base = self._modules["base_layer"]
        assert base is not None
        frozen = frozen_linear(base)
        if frozen is None or not can_fuse(input, frozen.saved()):
            return super().forward(input)
        live = self.live()
        branches: list[Branch] = []
        for update in live:
            branch = update.fused()
            if branch is None:
                break
            branches.append(branch)
        others = live[len(branches) :]
        if not branches or (others and not all(isinstance(u, Offset) for u in others)):
            return super().forward(input)
        if (routing := live[0].switch.routing) is not None:
            self.fit_rows(routing, input)
        y = adapted_linear(frozen, input, branches)
        return self.with_updates(y, input, others) if others else y

    def branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return branch_linear(x, A, B)

    def add_branch(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        return add_delta_linear(y, x, A, B, scale, dropout)


class LoRAEmbedding(LoRAWrapper):
    """nn.Embedding with updates: y = base(ids) + Σ s · Aᵀ[ids] Bᵀ.

    Shapes: ids (...), y (..., dim), A (r, num), B (dim, r); the weight is (num, dim). A starts
    zero and B random, so that only rows of ids that occur change. There is no dropout: the input
    is a row number. Where the base multiplies its rows with a constant, as Gemma's does, the change
    of the row is multiplied with it too.
    """

    base_layer: nn.Embedding
    lookup = True

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base_layer.embedding_dim

    def gained(self, change: Tensor) -> Tensor:
        gain = embedding_gain(self.base_layer)
        return change if gain is None else change * gain

    def branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        dtype = self.base_layer.weight.dtype
        return self.gained(branch_embedding(x, A, B, dtype, self.padding_idx))

    def add_branch(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        if embedding_gain(self.base_layer) is not None:
            return super().add_branch(y, x, A, B, scale, 0.0)
        return add_delta_embedding(y, x, A, B, scale, self.padding_idx)


class LoRAConv(LoRAWrapper):
    """nn.Conv1d, Conv2d or Conv3d in every geometry: y = base(x) + Σ s · B (A ∗ D(x)).

    The weight (out, in/groups, ∏k) is read as a matrix with one row for each output, so A is
    (r, in/groups · ∏k) and B (out, r): δ has the shape of the weight and merges into it, whatever
    the groups. A is run as a convolution with the layer's own stride, padding, dilation and
    padding_mode, once for each group, and B as a convolution of size 1.
    """

    base_layer: _ConvNd

    # What owners read of a convolution to know the length of its output.
    stride = property(lambda self: self.base_layer.stride)
    padding = property(lambda self: self.base_layer.padding)
    dilation = property(lambda self: self.base_layer.dilation)
    groups = property(lambda self: self.base_layer.groups)
    kernel_size = property(lambda self: self.base_layer.kernel_size)
    in_channels = property(lambda self: self.base_layer.in_channels)
    out_channels = property(lambda self: self.base_layer.out_channels)

    def branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        conv, r = self.base_layer, A.shape[0]
        ones = (1,) * len(conv.kernel_size)
        down = A.to(x.dtype).view(r, *conv.weight.shape[1:]).repeat(conv.groups, 1, *ones)
        up = B.to(x.dtype).view(conv.out_channels, r, *ones)
        narrow = conv._conv_forward(x, down, None)  # type: ignore[operator]
        return _CONVOLVE[len(ones)](narrow, up, None, 1, 0, 1, conv.groups)

    def channels(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1,) * len(self.base_layer.kernel_size))


_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def has_bias(module: nn.Module) -> bool:
    """Whether a module has a bias, be it a parameter or computed from one."""
    return isinstance(getattr(module, "bias", None), Tensor)
