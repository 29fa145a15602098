"""A sketch of the base's weights, small enough for a header and unmoved by a change of dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rankwise.attaching import attached
from rankwise.errors import ArtifactError
from rankwise.io.tensors import strict_json
from rankwise.layers import is_quantized, is_wrapped
from rankwise.targets import sites

__all__ = [
    "METADATA_KEY",
    "Sketch",
    "agree",
    "alike",
    "contrast",
    "differences",
    "own_modules",
    "sketch",
]

METADATA_KEY = "rankwise.base"
_VERSION = 2  # of version 1, whose norms were of all numbers, the entries alone are compared
_VALUES = 8
_SAMPLE = 2**12  # a norm over all numbers would read the whole base each time an adapter is loaded
_RELATIVE = 2.0**-8  # twice the largest rounding of bfloat16
_ABSOLUTE = 1e-4  # of a root mean square: what float16 loses below its normal range, and more


@dataclass(frozen=True)
class Sketch:
    """Some numbers of each adapted weight, by which a base is told from another.

    Attributes:
        base: what the base was called.
        modules: of each weight the norm of some 4,096 of its entries and 8 entries themselves,
            both evenly spaced from the first in storage order; by the module's name, or by the
            parameter's full name where it is not the weight of a layer. A norm that is not known
            is NaN.
    """

    base: str | None
    modules: Mapping[str, tuple[float, ...]]

    def to_json(self) -> str:
        """As one line of JSON, six digits each: about a hundred bytes a module.

        A module whose norm is not known is left out.
        """
        kept = {n: values for n, values in self.modules.items() if not math.isnan(values[0])}
        rounded = {n: [float(f"{v:.6g}") for v in values] for n, values in kept.items()}
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
        if raw.get("version") not in (1, _VERSION) or not isinstance(modules, dict):
            raise ArtifactError(
                f"{where}: the entry '{METADATA_KEY}' is no sketch of version {_VERSION}. It was "
                "written by a newer Rankwise, or by something else."
            )
        old = raw["version"] == 1
        table = cast("dict[str, object]", modules)
        read = {name: _numbers(values) for name, values in table.items()}
        kept = {n: (math.nan, *v[1:]) if old else v for n, v in read.items() if v is not None}
        if len(kept) != len(read):
            raise ArtifactError(f"{where}: the entry '{METADATA_KEY}' is damaged.")
        return Sketch(base if isinstance(base, str) else None, kept)


def sketch(model: nn.Module, names: Iterable[str], base: str | None = None) -> Sketch:
    """The sketch of the weights that these names mean, adapted or not.

    A part of a fused projection or of an attention stands for the parameter that holds it.
    Quantised weights and those on meta are left out.
    """
    modules = own_modules(model)
    keys = dict.fromkeys(key for name in names if (key := _key(modules, name)) is not None)
    values = {k: _values(w) for k in keys if (w := _weight(modules, k)) is not None}
    return Sketch(base, values)


def differences(known: Sketch, model: nn.Module) -> list[str]:
    """One sentence about the base if a weight differs from the sketch by more than a change of
    dtype can explain, with the first one where it does; empty when all agree.

    Weights that the model lacks are left to the checks of names and shapes.
    """
    modules = own_modules(model)
    weights = {k: w for k in known.modules if (w := _weight(modules, k)) is not None}
    here = {key: _values(weight) for key, weight in weights.items()}
    unlike = [k for k, w in weights.items() if not alike(known.modules[k], here[k], w.numel())]
    if not unlike:
        return []
    first = unlike[0]
    called = f" ('{known.base}')" if known.base else ""
    what = f"the weight of '{first}'" if first in modules else f"'{first}'"
    there, now = contrast(known.modules[first], here[first])
    sentence = (
        f"it was made on another base{called}: {what} has {there} there, {now} in this model "
        f"({len(unlike)} of {len(here)} weights differ)."
    )
    return [sentence]


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by name, where adapted layers and trained copies stand for them."""
    originals = {
        name: module for each in attached(model).values() for name, module in each.originals.items()
    }
    found = {name: site.base for name, site in sites(model).items()}
    for owner, original in originals.items():
        found.update(original.named_modules(prefix=owner))
    return found


def agree(first: Tensor, second: Tensor) -> bool:
    """Whether two weights are the same up to a change of dtype."""
    if first.shape != second.shape:
        return False
    a, b = first.detach().to("cpu", torch.float32), second.detach().to("cpu", torch.float32)
    root_mean_square = float(a.norm()) / math.sqrt(max(a.numel(), 1))
    return torch.allclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE * root_mean_square)


def alike(known: tuple[float, ...], here: tuple[float, ...], size: int) -> bool:
    """Whether two sketches of a weight of this size differ by no more than a change of dtype.

    A norm that one of them does not know is not compared.
    """
    norms = [v[0] for v in (known, here) if not math.isnan(v[0])]
    root_mean_square = norms[0] / math.sqrt(max(min(size, _SAMPLE), 1)) if norms else 0.0
    slack = _ABSOLUTE * root_mean_square
    return len(known) == len(here) and all(
        abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) + slack
        for a, b in zip(known, here, strict=True)
        if not (math.isnan(a) or math.isnan(b))
    )


def contrast(known: tuple[float, ...], here: tuple[float, ...]) -> tuple[str, str]:
    """Two sketches of a weight in words, by their norms where both are known."""
    if math.isnan(known[0]) or math.isnan(here[0]):
        return f"first value {known[1]:.6g}", f"{here[1]:.6g}"
    before, now = (f"{v[0]:.6g} and first value {v[1]:.6g}" for v in (known, here))
    return f"a sampled norm of {before}", now


def _key(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Which weight holds what this adapted name means: a module's, or a parameter."""
    if name in modules:
        return name
    owner = name.rpartition(".")[0]
    module = modules.get(owner)
    if module is None:
        return None
    held = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.MultiheadAttention):
        packed = held.get("in_proj_weight") is not None
        return f"{owner}.in_proj_weight" if packed else f"{name}_weight"
    return owner if is_wrapped(module) else name


def _weight(modules: Mapping[str, nn.Module], key: str) -> Tensor | None:
    owner, parameter = (key, "weight") if key in modules else key.rpartition(".")[::2]
    module = modules.get(owner)
    if module is None or is_quantized(module):
        return None
    weight = dict(module.named_parameters(recurse=False)).get(parameter)
    return None if weight is None or weight.is_meta or not weight.numel() else weight.detach()


def _values(weight: Tensor) -> tuple[float, ...]:
    flat = weight.reshape(-1)
    last = flat.numel() - 1
    where = [round(i * last / (_VALUES - 1)) for i in range(_VALUES)]
    some = flat[:: max(1, flat.numel() // _SAMPLE)]
    norm = torch.linalg.vector_norm(some, dtype=torch.promote_types(flat.dtype, torch.float32))
    return (float(norm), *flat[torch.tensor(where, device=flat.device)].double().tolist())


def _numbers(values: object) -> tuple[float, ...] | None:
    """The norm and the entries of one module, or None when they are not that."""
    if not isinstance(values, list):
        return None
    numbers = cast("list[object]", values)
    whole = [v for v in numbers if isinstance(v, float) or (type(v) is int and abs(v) < 1 << 62)]
    fits = [float(v) for v in whole]
    return tuple(fits) if len(fits) == len(numbers) == _VALUES + 1 else None
