"""How a stored parameter is the matrix W (out, in) of a layer's function, or a bank of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from rankwise.errors import UserError
from rankwise.layers.alike import is_scaled_embedding, linear_alike
from rankwise.layers.frozen import is_quantized, logical_shape, own_parameter

__all__ = [
    "Layout",
    "Rows",
    "Split",
    "is_conv1d",
    "is_wrapped",
    "layout_of",
    "layouts",
    "refusal",
    "shape_of",
]

Rows = tuple[int, ...]
PARTS = ("q_proj", "k_proj", "v_proj")  # of nn.MultiheadAttention, as everybody else calls them
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Split:
    """The parts of a fused projection, such as query, key and value in one Linear.

    Attributes:
        names: of the parts, in their order; a part is then a target of its own, called
            ``module.part``.
        sizes: outputs of each part; None means equal sizes.
        heads: 0 when each part is one block of rows. Where the rows are laid out head by head
            (query, key, value of the first head, then of the second: BLOOM, GPT-NeoX), the number
            of heads.

    Raises:
        UserError: fewer than two names, names twice, or sizes that are not one for each.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    heads: int = 0

    def __post_init__(self) -> None:
        names = tuple(self.names)
        object.__setattr__(self, "names", names)
        if len(names) < 2 or len(set(names)) < len(names) or any("." in n or not n for n in names):
            raise UserError(f"Split needs two or more different names without dots, got {names}.")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))
            if len(self.sizes) != len(names) or any(size < 1 for size in self.sizes):
                raise UserError(f"Split needs one size above 0 for each of {names}.")

    def rows(self, outputs: int) -> dict[str, Rows]:
        """The output rows of each part of a layer with so many outputs.

        Raises:
            UserError: the sizes do not add up to the layer's outputs.
        """
        heads = self.heads or 1
        equal, rest = divmod(outputs, len(self.names) * heads)
        sizes = self.sizes or (equal * heads,) * len(self.names)
        if (rest and self.sizes is None) or sum(sizes) != outputs or any(s % heads for s in sizes):
            raise UserError(
                f"Split {self.names} does not fit a layer with {outputs} outputs"
                f"{f' and {heads} heads' if self.heads else ''}; say sizes=(...)."
            )
        found: dict[str, list[int]] = {name: [] for name in self.names}
        start = 0
        for _ in range(heads):
            for name, size in zip(self.names, sizes, strict=True):
                found[name].extend(range(start, start + size // heads))
                start += size // heads
        return {name: tuple(rows) for name, rows in found.items()}


@dataclass(frozen=True)
class Layout:
    """One parameter of a module, read as W (out, in), or as a bank of E such matrices.

    Attributes:
        parameter: its name in the module, ``weight`` or another.
        shape: as stored (as it would be stored plainly, for a quantised one).
        transposed: stored as (in, out).
        bank: three dimensions, the first of which counts the weights of the bank.
        part: name of the part of a fused projection, None for the whole.
        rows: the outputs that make up the part, None for all.
    """

    parameter: str
    shape: tuple[int, ...]
    transposed: bool = False
    bank: bool = False
    part: str | None = None
    rows: Rows | None = None

    @property
    def out_features(self) -> int:
        if self.rows is not None:
            return len(self.rows)
        return self.shape[-1] if self.transposed else self.shape[1 if self.bank else 0]

    @property
    def in_features(self) -> int:
        if self.bank:
            return self.shape[1] if self.transposed else self.shape[2]
        return self.shape[0] if self.transposed else _product(self.shape[1:])

    @property
    def experts(self) -> int | None:
        """E, the weights in a bank; None for a single weight."""
        return self.shape[0] if self.bank else None

    @property
    def suffix(self) -> str:
        """What stands behind the module's name in the name of this weight."""
        if self.part is not None:
            return "." + self.part
        return "" if self.parameter == "weight" else "." + self.parameter

    def matrix(self, stored: Tensor) -> Tensor:
        """All rows of the stored tensor as (outputs, in) or (E, outputs, in), mostly a view."""
        if self.transposed:
            return stored.mT
        return stored if self.bank else stored.flatten(1)

    def cut(self, matrix: Tensor) -> Tensor:
        """The rows of this part."""
        if self.rows is None:
            return matrix
        return matrix.index_select(-2, torch.tensor(self.rows, device=matrix.device))

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix of all rows in the shape it is stored in; the inverse of :meth:`matrix`."""
        return matrix.mT if self.transposed else matrix.reshape(self.shape)


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, told without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_wrapped(module: nn.Module) -> bool:
    """Whether the module as a whole is one weight that a layer can be put around.

    Any other module keeps its place, and single parameters of it are adapted.
    """
    return isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or is_conv1d(module)


def layout_of(module: nn.Module) -> Layout:
    """The weight of a module that :func:`is_wrapped`."""
    shape = logical_shape(module)
    return Layout("weight", shape, transposed=isinstance(module, nn.Embedding) or is_conv1d(module))


def layouts(module: nn.Module, split: Split | None = None) -> Mapping[str, Layout]:
    """Every weight of a module that can be named, by what follows the module's name.

    "" is the module itself. nn.MultiheadAttention has .q_proj, .k_proj and .v_proj, whichever
    way it stores them; its out_proj is a module of its own. A ``split`` adds its parts. Of other
    modules every parameter of two or three dimensions is one. Buffers and the parameters of
    submodules are not listed.

    Raises:
        UserError: the split does not fit.
    """
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if is_wrapped(module):
        whole = layout_of(module)
        found = {"": whole}
        if split is not None:
            rows = split.rows(whole.out_features)
            found.update({f".{n}": replace(whole, part=n, rows=r) for n, r in rows.items()})
        return found
    if isinstance(module, nn.RNNBase | _ConvNd):  # these do not read their parameters by name,
        return {}  # or store them in another way
    own = {name: p for name, p in vars(module)["_parameters"].items() if p is not None}
    if not own:  # as of most modules of a model
        return {}
    turned = getattr(module, "is_transposed", False) is True  # as transformers marks its experts
    return {
        f".{name}": Layout(name, tuple(p.shape), turned and p.ndim == 3, bank=p.ndim == 3)
        for name, p in own.items()
        if not isinstance(p, nn.UninitializedParameter) and p.ndim in (2, 3)
    }


def _attention(module: nn.MultiheadAttention) -> dict[str, Layout]:
    size = module.embed_dim
    if own_parameter(module, "in_proj_weight") is None:
        sizes = {"q_proj": size, "k_proj": module.kdim, "v_proj": module.vdim}
        return {f".{n}": Layout(f"{n}_weight", (size, s), part=n) for n, s in sizes.items()}
    return {
        f".{n}": Layout(
            "in_proj_weight",
            (3 * size, size),
            part=n,
            rows=tuple(range(i * size, (i + 1) * size)),
        )
        for i, n in enumerate(PARTS)
    }


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a wrapped layer's function: of δ, whichever way round the weight is stored."""
    layout = layout_of(module)
    return layout.out_features, layout.in_features


def refusal(module: nn.Module, layout: Layout | None = None) -> str | None:
    """Why this weight of a module cannot be adapted, or None when it can.

    A subclass with a ``forward`` of its own is refused: what it does with its weight is unknown,
    so merging it could change its function. Exceptions are quantised layers, whose forward is the
    base's product and nothing else, and what is found to compute a plain layer, or an embedding
    times a constant, by running it (:mod:`rankwise.layers.alike`).
    """
    parameter = layout.parameter if layout is not None else "weight"
    if not is_wrapped(module) and layout is None:
        return _unfit(module)
    if is_wrapped(module) and not is_quantized(module):
        reason = _own_forward(module)
        if reason is not None:
            return reason
    weight = own_parameter(module, parameter)
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet; run one batch through the model first"
    if not is_wrapped(module) and weight is None:
        return f"its {parameter} is not a plain parameter"
    if weight is not None and not weight.dtype.is_floating_point and not is_quantized(module):
        return f"its {parameter} is {weight.dtype}, not a floating-point matrix"
    return None


def _unfit(module: nn.Module) -> str:
    names = [name.removeprefix(".") for name in layouts(module)]
    kind = type(module).__name__
    if names:
        return f"{kind} is adapted by its single weights: name {', '.join(names)}"
    return (
        f"{kind} is not one of Linear, Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention and "
        "transformers' Conv1D, and holds no parameter of two or three dimensions by itself"
    )


def _own_forward(module: nn.Module) -> str | None:
    kind = type(module)
    plain = next(
        (c for c in (nn.Linear, nn.Embedding, *CONVOLUTIONS) if isinstance(module, c)), None
    )
    if isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward:
        plain = None if linear_alike(module) else plain
    if isinstance(module, nn.Embedding) and kind.forward is not nn.Embedding.forward:
        plain = None if is_scaled_embedding(module) else plain
    if plain is not None and kind.forward is not plain.forward:
        article = "an" if plain is nn.Embedding else "a"
        return f"{kind.__name__} is {article} {plain.__name__} with a forward of its own"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an Embedding with max_norm rewrites its own weight during forward"
    return None
