"""A frozen layer plus δ: LoRALinear and LoRAEmbedding, whose .weight tells the truth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.inits import Init, Kaiming
from rankwise.kernels import add_delta_embedding, add_delta_linear
from rankwise.lowrank import Factors, scaling

__all__ = ["LoRAEmbedding", "LoRALayer", "LoRALinear", "Spec", "refusal", "shape_of", "wrap"]


@dataclass(frozen=True)
class Spec:
    """What one adapted layer is asked to be.

    Attributes:
        r: rank, a whole number of 1 or more.
        alpha: α, a finite number above 0.
        rank_stabilized: s = α/√r when true, else α/r.
        dropout: probability of zeroing an input of the LoRA branch during training, in [0, 1).
        init: how A and B start.
    """

    r: int
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0
    init: Init = Kaiming()

    @property
    def scale(self) -> float:
        return scaling(self.r, self.alpha, self.rank_stabilized)


class LoRALayer(nn.Module, ABC):
    """A frozen layer and a trained low-rank update beside it: y = base(x) + δ(x).

    ``base_layer`` is the untouched original module, ``lora_A`` (r, in) and ``lora_B`` (out, r) are
    parameters in float32 (float64 on a float64 base), whatever the dtype of the frozen layer.
    Owners that never call ``forward`` but read ``.weight``, as nn.MultiheadAttention and the fast
    path of nn.TransformerEncoderLayer do, get W0 + δ, differentiable in A and B.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; docs/math.md (1).
    """

    base_layer: nn.Module
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base_layer: nn.Module, spec: Spec) -> None:
        super().__init__()
        base = weight_of(base_layer)
        out_features, in_features = shape_of(base_layer)
        dtype = torch.promote_types(base.dtype, torch.float32)
        self.base_layer = base_layer
        self.spec = spec
        self.scale = spec.scale
        self.lora_A = nn.Parameter(
            torch.zeros(spec.r, in_features, dtype=dtype, device=base.device)
        )
        self.lora_B = nn.Parameter(
            torch.zeros(out_features, spec.r, dtype=dtype, device=base.device)
        )
        self.train(base_layer.training)

    @property
    @abstractmethod
    def transposed(self) -> bool:
        """Whether the layer stores its weight as (in, out), the transpose of δ."""

    @property
    def weight(self) -> Tensor:
        """The weight in force, W0 + δ, in the base's own orientation, rounded once to its dtype."""
        base = weight_of(self.base_layer)
        delta = self.factors().delta()
        wide = base.to(self.lora_A.dtype)  # and not delta's dtype, which autocast may have lowered
        return (wide + (delta.T if self.transposed else delta)).to(base.dtype)

    def factors(self) -> Factors:
        """A, B and s of this layer; the tensors are the live parameters, not copies."""
        return Factors(self.lora_A, self.lora_B, self.scale)

    def extra_repr(self) -> str:
        s = self.spec
        form = "alpha/sqrt(r)" if s.rank_stabilized else "alpha/r"
        return f"r={s.r}, alpha={s.alpha:g}, scale={self.scale:g} ({form}), dropout={s.dropout:g}"


class LoRALinear(LoRALayer):
    """nn.Linear or transformers' Conv1D with an update: y = base(x) + s · D(x) Aᵀ Bᵀ.

    Shapes: x (..., in), y (..., out), A (r, in), B (out, r). A starts random, B zero. The weight of
    nn.Linear is (out, in); Conv1D stores (in, out), and only :attr:`weight` cares.
    """

    def __init__(self, base_layer: nn.Module, spec: Spec) -> None:
        super().__init__(base_layer, spec)
        self._transposed = is_conv1d(base_layer)
        if not self.lora_A.is_meta:
            spec.init.draw(self.lora_A.data)

    @property
    def transposed(self) -> bool:
        return self._transposed

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.get_parameter("bias") if has_bias(self.base_layer) else None

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.spec.dropout if self.training else 0.0
        return add_delta_linear(
            self.base_layer(x), x, self.lora_A, self.lora_B, self.scale, dropout
        )


class LoRAEmbedding(LoRALayer):
    """nn.Embedding with an update: y = base(ids) + s · Aᵀ[ids] Bᵀ.

    Shapes: ids (...), y (..., dim), A (r, num), B (dim, r); the weight is (num, dim). A starts
    zero and B random, so that only rows of ids that occur change. There is no dropout: the input
    is a row number.
    """

    base_layer: nn.Embedding  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, base_layer: nn.Embedding, spec: Spec) -> None:
        super().__init__(base_layer, spec)
        if not self.lora_B.is_meta:
            spec.init.lookup(self.lora_B.data)

    @property
    def transposed(self) -> bool:
        return True

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base_layer.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        return add_delta_embedding(
            self.base_layer(ids), ids, self.lora_A, self.lora_B, self.scale, self.padding_idx
        )


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, told without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def has_bias(module: nn.Module) -> bool:
    return any(name == "bias" for name, _ in module.named_parameters(recurse=False))


def weight_of(module: nn.Module) -> Tensor:
    """The stored weight of a layer that :func:`refusal` has nothing against."""
    weight = module.weight
    if not isinstance(weight, Tensor):  # pragma: no cover - excluded by refusal()
        raise TypeError(f"{type(module).__name__}.weight is not a tensor")
    return weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's function: of δ, whichever way round the weight is stored."""
    rows, columns = weight_of(module).shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def refusal(module: nn.Module) -> str | None:
    """Why this module cannot be adapted, or None when it can.

    A subclass with a ``forward`` of its own is refused: what it does with its weight is unknown,
    so merging it could change its function.
    """
    kind = type(module)
    if isinstance(module, LoRALayer):
        return "it is adapted already; detach the first adapter, or merge it, before adding another"
    if isinstance(module, nn.Linear):
        if kind.forward is not nn.Linear.forward:
            return f"{kind.__name__} is a Linear with a forward of its own"
    elif isinstance(module, nn.Embedding):
        if kind.forward is not nn.Embedding.forward:
            return f"{kind.__name__} is an Embedding with a forward of its own"
        if module.max_norm is not None:
            return "an Embedding with max_norm rewrites its own weight during forward"
    elif not is_conv1d(module):
        return f"{kind.__name__} is not one of Linear, Embedding and transformers' Conv1D"
    weight = weight_of(module)
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet; run one batch through the model first"
    if not weight.dtype.is_floating_point:
        return f"its weight is {weight.dtype}, not a floating-point matrix"
    return None


def wrap(module: nn.Module, spec: Spec) -> LoRALayer:
    """Put an update beside a layer that :func:`refusal` has nothing against."""
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding(module, spec)
    return LoRALinear(module, spec)
