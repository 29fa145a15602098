"""A sketch of the base's weights, small enough for a header and unmoved by a change of dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rankwise.errors import ArtifactError
from rankwise.io.tensors import strict_json
from rankwise.layers import LoRALayer

__all__ = ["METADATA_KEY", "Sketch", "agree", "differences", "sketch"]

METADATA_KEY = "rankwise.base"
_VERSION = 1
_VALUES = 8
_RELATIVE = 2.0**-8  # twice the largest rounding of bfloat16
_ABSOLUTE = 1e-4  # of a root mean square: what float16 loses below its normal range, and more


@dataclass(frozen=True)
class Sketch:
    """Some numbers of each adapted weight, by which a base is told from another.

    Attributes:
        base: what the base was called.
        modules: for each module the Frobenius norm of its weight and 8 of its entries, evenly
            spaced from the first to the last in storage order.
    """

    base: str | None
    modules: Mapping[str, tuple[float, ...]]

    def to_json(self) -> str:
        """As one line of JSON, six digits each: about a hundred bytes a module."""
        rounded = {n: [float(f"{v:.6g}") for v in values] for n, values in self.modules.items()}
        whole = {"version": _VERSION, "base": self.base, "modules": rounded}
        return json.dumps(whole, separators=(",", ":"))

    @staticmethod
    def from_json(text: str, where: str) -> Sketch:
        """Read what :meth:`to_json` wrote.

        Raises:
            ArtifactError: it is something else.
        """
        raw = strict_json(text.encode("utf-8", "replace"), where, f"the entry '{METADATA_KEY}'")
        modules, base = raw.get("modules"), raw.get("base")
        if raw.get("version") != _VERSION or not isinstance(modules, dict):
            raise ArtifactError(
                f"{where}: the entry '{METADATA_KEY}' is no sketch of version {_VERSION}. It was "
                "written by a newer Rankwise, or by something else."
            )
        table = cast("dict[str, object]", modules)
        read = {name: _numbers(values) for name, values in table.items()}
        kept = {name: values for name, values in read.items() if values is not None}
        if len(kept) != len(read):
            raise ArtifactError(f"{where}: the entry '{METADATA_KEY}' is damaged.")
        return Sketch(base if isinstance(base, str) else None, kept)


def sketch(model: nn.Module, names: Iterable[str], base: str | None = None) -> Sketch:
    """The sketch of the named modules of a model, adapted or not; those on meta are left out."""
    values = {
        name: _values(weight) for name in names if (weight := _weight(model, name)) is not None
    }
    return Sketch(base, values)


def differences(known: Sketch, model: nn.Module) -> list[str]:
    """One sentence about the base if a weight differs from the sketch by more than a change of
    dtype can explain, with the first module where it does; empty when all agree.

    Modules that the model lacks are left to the checks of names and shapes.
    """
    present = {name for name, _ in model.named_modules()} & set(known.modules)
    here = sketch(model, [n for n in known.modules if n in present])
    unlike = [
        name
        for name, values in here.modules.items()
        if not _same(known.modules[name], values, _weight_size(model, name))
    ]
    if not unlike:
        return []
    first = unlike[0]
    called = f" ('{known.base}')" if known.base else ""
    sentence = (
        f"it was made on another base{called}: the weight of '{first}' has norm "
        f"{known.modules[first][0]:.6g} and first value {known.modules[first][1]:.6g} there, "
        f"{here.modules[first][0]:.6g} and {here.modules[first][1]:.6g} in this model "
        f"({len(unlike)} of {len(here.modules)} weights differ)."
    )
    return [sentence]


def agree(first: Tensor, second: Tensor) -> bool:
    """Whether two weights are the same up to a change of dtype."""
    if first.shape != second.shape:
        return False
    a, b = first.detach().to("cpu", torch.float32), second.detach().to("cpu", torch.float32)
    root_mean_square = float(a.norm()) / math.sqrt(max(a.numel(), 1))
    return torch.allclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE * root_mean_square)


def _same(known: tuple[float, ...], here: tuple[float, ...], size: int) -> bool:
    slack = _ABSOLUTE * known[0] / math.sqrt(max(size, 1))
    return len(known) == len(here) and all(
        abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) + slack
        for a, b in zip(known, here, strict=True)
    )


def _weight(model: nn.Module, name: str) -> Tensor | None:
    module = model.get_submodule(name)
    inner = module.base_layer if isinstance(module, LoRALayer) else module
    weight = dict(inner.named_parameters(recurse=False)).get("weight")
    return None if weight is None or weight.is_meta else weight.detach()


def _weight_size(model: nn.Module, name: str) -> int:
    weight = _weight(model, name)
    return 1 if weight is None else weight.numel()


def _values(weight: Tensor) -> tuple[float, ...]:
    flat = weight.reshape(-1)
    last = flat.numel() - 1
    where = [round(i * last / (_VALUES - 1)) for i in range(_VALUES)]
    norm = torch.linalg.vector_norm(flat, dtype=torch.promote_types(flat.dtype, torch.float32))
    return (float(norm), *flat[torch.tensor(where, device=flat.device)].double().tolist())


def _numbers(values: object) -> tuple[float, ...] | None:
    """The norm and the entries of one module, or None when they are not that."""
    if not isinstance(values, list):
        return None
    numbers = cast("list[object]", values)
    fits = [float(v) for v in numbers if isinstance(v, float) or type(v) is int]
    return tuple(fits) if len(fits) == len(numbers) == _VALUES + 1 else None
