"""A model as a graph of named tensors, in which the sizes of batch and length stay open."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import RankwiseError, UserError
from rankwise.merging.effect import Probe
from rankwise.targets import is_transformers

__all__ = ["Axes", "ExportError", "Graph", "other_shape", "trace"]

Axes = Mapping[str, Mapping[int, str]]
"""For each input the axes that may have any size, and a name for the size of each."""


class ExportError(RankwiseError):
    """A model cannot be exported, or the exported one computes something else; nothing is kept."""

    exit_code = 3


@dataclass(frozen=True)
class Graph:
    """A model that torch.export has followed.

    Attributes:
        program: torch's graph with the weights.
        module: what was followed: a function from named tensors to named tensors.
        inputs: the example's tensors, by the names of the model's arguments.
        axes: of every input the axes that stay open.
        outputs: names, in order.
        longest: the largest size of each such axis that the model takes, None for no limit.
    """

    program: torch.export.ExportedProgram
    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Axes
    outputs: tuple[str, ...]
    longest: Mapping[str, int | None]


def trace(model: nn.Module, example: Probe, dynamic: Axes | None = None) -> Graph:
    """Follow a model on an example; see :func:`rankwise.train.exported.export_model`.

    Raises:
        UserError: the example or the axes do not fit the model.
        ExportError: an axis that was to stay open is fixed by the model.
    """
    inputs, constants = _split(model, example)
    axes = _usual_axes(inputs) if dynamic is None else _checked(dynamic, inputs)
    wrapped = _signed(tuple(inputs))(model, constants)
    outputs = wrapped(**inputs)
    sample = _two_rows(inputs, axes)
    program = torch.export.export(
        wrapped,
        (),
        kwargs=sample,
        dynamic_shapes={
            n: dict.fromkeys(those, torch.export.Dim.AUTO) for n, those in axes.items()
        },
        strict=False,
    )
    longest = _longest(program, tuple(sample), axes)
    return Graph(program, wrapped, inputs, axes, tuple(outputs), longest)


def other_shape(graph: Graph) -> dict[str, Tensor]:
    """Inputs of another shape: one row (two where the example has one), half of the other axes.

    Of rows that an attention_mask shows to be padded in front, the last half.
    """
    mask = graph.inputs.get("attention_mask")
    last = mask is not None and mask.ndim == 2 and bool(mask[:, 0].sum() < mask[:, -1].sum())
    found: dict[str, Tensor] = {}
    for name, x in graph.inputs.items():
        for axis in graph.axes[name]:
            size = x.shape[axis]
            if axis == 0:
                x = torch.cat([x, x]) if size == 1 else x[:1]
            else:
                keep = (size + 1) // 2
                x = x.narrow(axis, size - keep if last else 0, keep)
        found[name] = x.contiguous()
    return found


class _Wrapped(nn.Module):
    """A model as a function from named tensors to named tensors."""

    def __init__(self, model: nn.Module, constants: Mapping[str, object]) -> None:
        super().__init__()
        self.model = model
        self.constants = dict(constants)


def _signed(names: tuple[str, ...]) -> type[_Wrapped]:
    """A wrapper whose forward takes arguments of these names, which become the exported inputs."""

    def forward(self: _Wrapped, *values: Tensor, **named: Tensor) -> dict[str, Tensor]:
        inputs = {**dict(zip(names, values, strict=False)), **named}
        return _outputs(self.model, self.model(**inputs, **self.constants))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    vars(forward)["__signature__"] = inspect.Signature(parameters)
    return type("Exported", (_Wrapped,), {"forward": forward})


def _split(model: nn.Module, example: Probe) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The example's tensors by the names of the model's arguments, and what is no tensor."""
    accepted = list(inspect.signature(model.forward).parameters)
    if isinstance(example, Mapping):
        named = {str(name): value for name, value in example.items()}
    else:
        values = [example] if isinstance(example, Tensor) else list(example)
        if len(values) > len(accepted):
            raise UserError(
                f"{type(model).__name__} takes {len(accepted)} inputs, got {len(values)}."
            )
        named = dict(zip(accepted, values, strict=False))
    inputs = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not inputs or any(tensor.ndim == 0 or tensor.numel() == 0 for tensor in inputs.values()):
        raise UserError("The example needs tensors, and none without an axis or empty.")
    constants = {name: value for name, value in named.items() if name not in inputs}
    if is_transformers(model) and "use_cache" in accepted:
        constants.setdefault("use_cache", False)
    return inputs, constants


def _usual_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    return {
        name: {0: "batch"} | ({1: "length"} if x.ndim == 2 and not x.is_floating_point() else {})
        for name, x in inputs.items()
    }


def _checked(dynamic: Axes, inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """The axes as asked for, for every input.

    Raises:
        UserError: there is no such input or axis, or equal names mean different sizes.
    """
    sizes: dict[str, int] = {}
    for name, axes in dynamic.items():
        if name not in inputs:
            raise UserError(f"dynamic: the example has no input '{name}', but {', '.join(inputs)}.")
        shape = inputs[name].shape
        for axis, size in axes.items():
            if not 0 <= axis < len(shape):
                raise UserError(f"dynamic: '{name}' {tuple(shape)} has no axis {axis}.")
            if sizes.setdefault(size, shape[axis]) != shape[axis]:
                raise UserError(f"dynamic: '{size}' is {sizes[size]} and {shape[axis]} at once.")
    return {name: dict(dynamic.get(name, {})) for name in inputs}


def _outputs(model: nn.Module, result: object) -> dict[str, Tensor]:
    """The logits where there are any, else every floating-point tensor, by name."""
    named: dict[str, object] = {}
    if isinstance(result, Tensor):
        named = {"output": result}
    elif isinstance(result, Mapping):
        named = {"logits": result["logits"]} if "logits" in result else dict(result)
    elif isinstance(result, (tuple, list)):
        named = {f"output_{i}": value for i, value in enumerate(result)}
    found = {n: t for n, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if not found:
        raise UserError(
            f"{type(model).__name__} returned {type(result).__name__} without a floating-point "
            "tensor; export a model that returns a tensor, a tuple or a mapping of them."
        )
    return found


def _two_rows(inputs: Mapping[str, Tensor], axes: Axes) -> dict[str, Tensor]:
    """The example, a single row of it twice: torch.export takes a size of 1 for fixed."""
    return {
        name: torch.cat([x, x]) if 0 in axes[name] and len(x) == 1 else x
        for name, x in inputs.items()
    }


def _longest(
    program: torch.export.ExportedProgram, inputs: tuple[str, ...], axes: Axes
) -> dict[str, int | None]:
    """The largest size of each open axis that the graph allows.

    Raises:
        ExportError: the graph fixes an axis that was to stay open.
    """
    places: dict[str, Any] = {node.name: node.meta.get("val") for node in program.graph.nodes}
    taken = dict(zip(inputs, map(str, program.graph_signature.user_inputs), strict=True))
    longest: dict[str, int | None] = {}
    for name, those in axes.items():
        for axis, size in those.items():
            symbol: Any = places[taken[name]].shape[axis]
            fixed = symbol.node.maybe_as_int() if isinstance(symbol, torch.SymInt) else symbol
            if fixed is not None:
                raise ExportError(
                    f"Axis {axis} of '{name}' cannot stay open: the model fixes it to {fixed}. "
                    "Leave it out of dynamic, or give an example in which it is 2 or more."
                )
            ranges = program.range_constraints.get(symbol.node.expr)
            upper = None if ranges is None or not ranges.upper.is_Integer else int(ranges.upper)
            known = [most for most in (longest.get(size), upper) if most is not None]
            longest[size] = min(known, default=None)
    return longest
