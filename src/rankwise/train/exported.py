"""A model as an ONNX file or a torch.export program, run and compared before it is kept."""

from __future__ import annotations

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.errors import EnvironmentFault, RankwiseError, UserError
from rankwise.io import files
from rankwise.merging.effect import Probe, at_rest, difference
from rankwise.merging.rounding import roundoff
from rankwise.train.graph import Axes, ExportError, Graph, other_shape, trace

__all__ = [
    "ExportCheck",
    "ExportError",
    "ExportReport",
    "Format",
    "Onnx",
    "TorchExport",
    "export_model",
    "write_model",
]

WIDE, SHORT = 256, 8  # of the unit roundoff: what many layers lose when they add in another order
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ExportCheck:
    """The exported model against the model, both run on the same inputs.

    Outputs at positions that an attention_mask leaves out are not compared.

    Attributes:
        shapes: of the inputs, by name.
        error: max |exported - model| of the output that is nearest to its tolerance.
        tolerance: 256 u max |model| of that output on the example, with u the unit roundoff of its
            dtype (8 u for bfloat16 and float16): what another order of the same sums may cost.
    """

    shapes: Mapping[str, tuple[int, ...]]
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how it was checked.

    Attributes:
        format: "onnx" or "torch-export".
        sha256: of each file that was written, by name; the first is the one to load.
        inputs: the axes of each input that may have any size, with a name for the size.
        outputs: names, in order.
        longest: the largest size of each such axis that the model takes, None for no limit.
        checks: one for the example, one for inputs of another shape.
        versions: of the packages that wrote it and ran it.
    """

    format: str
    sha256: Mapping[str, str]
    inputs: Axes
    outputs: tuple[str, ...]
    longest: Mapping[str, int | None]
    checks: tuple[ExportCheck, ...]
    versions: Mapping[str, str]

    @property
    def error(self) -> float:
        """The largest error of all checks."""
        return max(check.error for check in self.checks)

    def line(self) -> str:
        """The report in one line."""
        worst = max(self.checks, key=lambda check: check.error / (check.tolerance or 1.0))
        sizes = [f"any {n}" if m is None else f"{n} up to {m}" for n, m in self.longest.items()]
        return (
            f"{next(iter(self.sha256))} ({self.format}): run on inputs of {len(self.checks)} "
            f"shape(s), error {worst.error:.3g}, tolerance {worst.tolerance:.3g}; takes "
            f"{', '.join(sizes) or 'this shape alone'}"
        )

    def to_json(self) -> dict[str, Any]:
        """The report as certificate.json holds it."""
        return {
            "format": self.format,
            "sha256": {name: f"sha256:{digest}" for name, digest in self.sha256.items()},
            "inputs": {n: {str(i): size for i, size in a.items()} for n, a in self.inputs.items()},
            "outputs": list(self.outputs),
            "longest": dict(self.longest),
            "error": self.error,
            "checks": [
                {
                    "shapes": {name: list(shape) for name, shape in check.shapes.items()},
                    "error": check.error,
                    "tolerance": check.tolerance,
                }
                for check in self.checks
            ],
            "versions": dict(self.versions),
        }


class Format(ABC):
    """What kind of file a model becomes."""

    name: ClassVar[str]
    file: ClassVar[str]

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The packages it takes, and their versions.

        Raises:
            EnvironmentFault: one is missing.
        """

    @abstractmethod
    def write(self, graph: Graph, file: Path) -> None:
        """Write the file, and others beside it where one is not enough."""

    @abstractmethod
    def read(self, file: Path, outputs: Sequence[str]) -> Run:
        """The file as a function from named tensors to named tensors."""


@dataclass(frozen=True)
class TorchExport(Format):
    """A torch.export program: ``torch.export.load(file).module()(**inputs)`` gives its outputs."""

    name: ClassVar[str] = "torch-export"
    file: ClassVar[str] = "model.pt2"

    def versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__)}

    def write(self, graph: Graph, file: Path) -> None:
        torch.export.save(graph.program, file)

    def read(self, file: Path, outputs: Sequence[str]) -> Run:
        module = torch.export.load(file).module()
        return lambda inputs: module(**inputs)


@dataclass(frozen=True)
class Onnx(Format):
    """An ONNX file, as onnxruntime and others run it; weights over 2 GB go into a file beside it.

    Attributes:
        opset: version of the ONNX operators; torch's own choice when None.
    """

    opset: int | None = None
    name: ClassVar[str] = "onnx"
    file: ClassVar[str] = "model.onnx"

    def versions(self) -> dict[str, str]:
        try:
            import onnx
            import onnxruntime
            import onnxscript
        except ImportError as error:
            raise EnvironmentFault(
                f"ONNX needs the package {error.name}, which is not installed. Install what it "
                'takes with: pip install "rankwise[onnx]"'
            ) from error
        found = {m.__name__: str(m.__version__) for m in (onnx, onnxscript, onnxruntime)}
        return {"torch": str(torch.__version__), **found}

    def write(self, graph: Graph, file: Path) -> None:
        import onnx

        program = torch.onnx.export(
            graph.program,
            dynamo=True,
            verbose=False,
            opset_version=self.opset,
            input_names=list(graph.axes),
            output_names=list(graph.outputs),
            dynamic_shapes={name: dict(axes) for name, axes in graph.axes.items()},
        )
        assert program is not None
        program.save(file)
        onnx.checker.check_model(str(file))

    def read(self, file: Path, outputs: Sequence[str]) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            arrays = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
            found = session.run(list(outputs), arrays)
            return {n: torch.from_numpy(a) for n, a in zip(outputs, found, strict=True)}

        return run


def export_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    example: Probe,
    form: Format | None = None,
    *,
    dynamic: Axes | None = None,
) -> ExportReport:
    """Write a model into a new folder as an ONNX file or a torch.export program.

    The file is read back and run, on the example and on inputs of another shape, and must give
    what the model gives; otherwise nothing is written. The model may be merged or carry adapters,
    and is left as it was. A transformers model gives its logits, without a cache.

    Args:
        model: any nn.Module whose forward torch.export can follow.
        folder: a folder that does not exist yet, or is empty.
        example: inputs by keyword, positional inputs, or one tensor. What is no tensor is fixed.
        form: Onnx() when None, or TorchExport().
        dynamic: for each input the axes that may have any size, with a name for the size, such as
            ``{"input_ids": {0: "batch", 1: "length"}}``; equal names mean equal sizes. None: the
            first axis of every input, and the second of inputs of whole numbers (batch, length).

    Raises:
        UserError: the folder holds something, or the example or the axes do not fit the model.
        ExportError: the model cannot be exported so, or the exported one computes something else.
        EnvironmentFault: a package is missing, or the disk refuses.
    """
    target = Path(folder)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"'{target}' is there already and not empty; name another folder.")
    with files.folder(target) as temporary:
        return write_model(model, temporary, example, form, dynamic=dynamic)


def write_model(
    model: nn.Module,
    folder: Path,
    example: Probe,
    form: Format | None = None,
    *,
    dynamic: Axes | None = None,
) -> ExportReport:
    """As :func:`export_model`, into a folder that is there; what fails may leave files behind."""
    form = form or Onnx()
    versions = form.versions()
    before = set(folder.iterdir())
    file = folder / form.file
    with at_rest(model), _quiet():
        try:
            graph = trace(model, example, dynamic)
            form.write(graph, file)
            run = form.read(file, graph.outputs)
            probes = [graph.inputs, *([other_shape(graph)] if graph.longest else [])]
            allowed = {n: _rounding(y) for n, y in graph.module(**graph.inputs).items()}
            checks = tuple(_check(graph, run, inputs, allowed) for inputs in probes)
        except RankwiseError:
            raise
        except Exception as error:
            raise ExportError(_cause(model, form, error)) from error
    bad = next((check for check in checks if not check.passed), None)
    if bad is not None:
        raise ExportError(
            f"The {form.name} file of {type(model).__name__} computes something else than the "
            f"model: on inputs {_sizes(bad)} the outputs differ by {bad.error:.3g}, where rounding "
            f"explains {bad.tolerance:.3g}. Nothing was kept."
        )
    written = sorted(set(folder.iterdir()) - before, key=lambda path: (path != file, path.name))
    return ExportReport(
        format=form.name,
        sha256={path.name: files.sha256_file(path) for path in written},
        inputs=graph.axes,
        outputs=graph.outputs,
        longest=graph.longest,
        checks=checks,
        versions=versions,
    )


def _check(
    graph: Graph, run: Run, inputs: Mapping[str, Tensor], allowed: Mapping[str, float]
) -> ExportCheck:
    wanted, found = graph.module(**inputs), run(inputs)
    mask = inputs.get("attention_mask")
    pairs = [
        (
            difference([_read(found[name].to(tensor.device), mask)], [_read(tensor, mask)]),
            allowed[name],
        )
        for name, tensor in wanted.items()
    ]
    error, tolerance = max(pairs, key=lambda pair: (not pair[0] <= pair[1], pair[0] - pair[1]))
    return ExportCheck({name: tuple(x.shape) for name, x in inputs.items()}, error, tolerance)


def _read(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Without the positions that the mask leaves out: a softmax over nothing may be anything."""
    if mask is None or mask.ndim != 2 or tensor.shape[:2] != mask.shape:
        return tensor
    return tensor[mask.bool()]


def _rounding(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return (WIDE if tensor.dtype.itemsize >= 4 else SHORT) * roundoff(tensor.dtype) * largest


def _sizes(check: ExportCheck) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in check.shapes.items())


def _cause(model: nn.Module, form: Format, error: Exception) -> str:
    root: BaseException = error
    while root.__cause__ is not None:  # torch.onnx wraps what went wrong in general advice
        root = root.__cause__
    first = (str(root).strip().splitlines() or [type(root).__name__])[0].rstrip(".")
    short = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in short))
    remedy = f" Export it in float32 (--dtype float32), not in {names}." if short else ""
    if "grouped_mm" in first:
        remedy += " Call model.set_experts_implementation('batched_mm') first."
    return (
        f"{type(model).__name__} cannot be written as {form.name} and run: {first}. Nothing was "
        f"kept.{remedy}"
    )


@contextmanager
def _quiet() -> Generator[None]:
    """No warnings of the exporters, which are about themselves, for the length of the block."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
