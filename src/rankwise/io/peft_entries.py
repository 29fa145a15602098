"""Which form each update takes in a PEFT file, and under which names its tensors stand there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from torch import nn

from rankwise.io.peft_forms import Convolution, Form, Linear, Parameter, Plain
from rankwise.io.peft_fused import Attention, Projection
from rankwise.layers import Layout, is_wrapped, layout_of
from rankwise.layers.layout import CONVOLUTIONS
from rankwise.targets import Target

__all__ = ["Paths", "attention_of", "forms_of", "packed_attention", "weight_name"]

_BASE = ".base_layer"


class Kind(Enum):
    """What PEFT would put around a weight."""

    LINEAR = auto()
    EMBEDDING = auto()
    CONVOLUTION = auto()
    PROJECTION = auto()
    ATTENTION = auto()
    PARAMETER = auto()
    TURNED = auto()
    PLAIN = auto()


@dataclass(frozen=True)
class Paths:
    """How PEFT names what is in a model: each module that it wraps moves into '.base_layer'.

    Attributes:
        wrappers: how many stand around each wrapped module; around one whose parameters are
            adapted, one for each of these.
    """

    wrappers: Mapping[str, int]

    def outer(self, name: str) -> str:
        """The outermost wrapper of a module, or the module itself where there is none."""
        parts = name.split(".")
        owners = (".".join(parts[: i + 1]) for i in range(len(parts) - 1))
        inner = (
            part + _BASE * self.wrappers.get(o, 0) for part, o in zip(parts, owners, strict=False)
        )
        return ".".join([*inner, parts[-1]])

    def inner(self, name: str) -> str:
        """The base's own module, behind its wrappers."""
        return self.outer(name) + _BASE * self.wrappers.get(name, 0)

    def tensor(self, name: str) -> str:
        """A tensor of the base, by its full name."""
        owner, _, last = name.rpartition(".")
        return f"{self.inner(owner)}.{last}" if owner else last


def packed_attention(module: nn.Module | None) -> bool:
    """Whether this is an attention that PEFT can adapt: with query, key and value in one matrix."""
    if not isinstance(module, nn.MultiheadAttention):
        return False
    return "in_proj_weight" in dict(module.named_parameters(recurse=False))


def attention_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The attention whose output projection this is, or None."""
    owner, _, last = name.rpartition(".")
    inside = last == "out_proj" and isinstance(modules.get(owner), nn.MultiheadAttention)
    return owner if inside else None


def weight_name(target: Target) -> str:
    """The full name of the parameter that holds an adapted weight."""
    return f"{target.site.name}.{target.layout.parameter}"


def forms_of(
    targets: Mapping[str, Target],
    modules: Mapping[str, nn.Module],
    *,
    dora: bool,
    alone: Collection[str] = (),
    turned: Collection[str] = (),
) -> tuple[list[Form], Paths]:
    """The forms that hold these updates, each with its path, and the paths of all else.

    Args:
        targets: the adapted weights by name.
        modules: the base's own modules by name.
        dora: whether each update has a magnitude, for which PEFT has fewer forms.
        alone: output projections of an attention that PEFT was told to adapt by themselves.
        turned: layers that PEFT was told to adapt by naming their parameter.
    """
    groups: dict[tuple[Kind, str], dict[str, Layout]] = {}
    for name, target in targets.items():
        kind, whole = _kind(name, target, modules, dora)
        if name in alone:
            kind, whole = Kind.LINEAR, name
        if name in turned:
            kind, whole = Kind.TURNED, weight_name(target)
        groups.setdefault((kind, whole), {})[name] = target.layout
    wrappers = Counter(_wrapped(kind, whole) for kind, whole in groups if kind is not Kind.PLAIN)
    for kind, whole in groups:
        if kind is Kind.ATTENTION:
            wrappers[f"{whole}.out_proj"] = 1
    paths = Paths(wrappers)
    forms = [
        _form(kind, whole, _path(kind, whole, paths, groups, modules), places, modules)
        for (kind, whole), places in groups.items()
    ]
    return forms, paths


def _kind(
    name: str, target: Target, modules: Mapping[str, nn.Module], dora: bool
) -> tuple[Kind, str]:
    """What PEFT would put there, and what it would call that."""
    site, layout = target.site.name, target.layout
    module = modules[site]
    attention = site if isinstance(module, nn.MultiheadAttention) else attention_of(name, modules)
    if attention is not None:
        fits = packed_attention(modules[attention]) and not dora
        return (Kind.ATTENTION, attention) if fits else (Kind.PLAIN, name)
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING, site
    if isinstance(module, CONVOLUTIONS):
        return (Kind.PLAIN, name) if dora and module.groups > 1 else (Kind.CONVOLUTION, site)
    if is_wrapped(module):
        return (Kind.LINEAR, site) if layout.part is None else (Kind.PROJECTION, site)
    return (Kind.PLAIN, name) if dora else (Kind.PARAMETER, weight_name(target))


def _wrapped(kind: Kind, whole: str) -> str:
    """The module that the wrapper stands around."""
    return whole.rpartition(".")[0] if kind in (Kind.PARAMETER, Kind.TURNED) else whole


def _path(
    kind: Kind,
    whole: str,
    paths: Paths,
    groups: Mapping[tuple[Kind, str], object],
    modules: Mapping[str, nn.Module],
) -> str:
    """Where the tensors of an update are. The first parameter of a module is wrapped innermost."""
    if kind is Kind.PLAIN:
        return whole
    owner = _wrapped(kind, whole)
    if kind is not Kind.PARAMETER:
        return paths.outer(owner)
    names = [f"{owner}.{n}" for n, _ in modules[owner].named_parameters(recurse=False)]
    order = [name for name in names if (Kind.PARAMETER, name) in groups]
    return paths.outer(owner) + _BASE * (len(order) - 1 - order.index(whole))


def _form(
    kind: Kind,
    whole: str,
    path: str,
    places: Mapping[str, Layout],
    modules: Mapping[str, nn.Module],
) -> Form:
    module = modules.get(whole)
    if kind is Kind.ATTENTION and isinstance(module, nn.MultiheadAttention):
        return Attention(whole, path, places, output=f"{whole}.out_proj", size=module.embed_dim)
    if kind is Kind.PROJECTION and module is not None:
        return Projection(whole, path, places, width=layout_of(module).out_features)
    if kind is Kind.CONVOLUTION and isinstance(module, CONVOLUTIONS):
        return Convolution(whole, path, places, groups=module.groups)
    if kind in (Kind.PARAMETER, Kind.TURNED):
        ((_, layout),) = places.items()
        turned = kind is Kind.TURNED and layout.transposed
        return Parameter(whole, path, places, turned=turned)
    if kind is Kind.PLAIN:
        return Plain(whole, path, places)
    return Linear(whole, path, places, embedding=kind is Kind.EMBEDDING)
