"""What the theory measured, as frozen records, and their file records.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar, cast

from rankwise.errors import ArtifactError, UserError, gather
from rankwise.io import files

__all__ = [
    "Bound",
    "Cell",
    "Inputs",
    "Samples",
    "Theory",
    "TheoryRecord",
    "read_record",
    "write_record",
]

FORMAT = 1
KIND = "rankwise theory"
Row = TypeVar("Row")


@dataclass(frozen=True)
class Theory:
    """The size of the theory's experiments.

    Attributes:
        outputs: out of the layer whose every rank is tried.
        inputs: in of that layer.
        steps: steps of training at each rank.
        ratio: largest over smallest eigenvalue of Σ, for inputs that are not alike.
        rows: numbers of samples to learn from, the fewest first; each at least ``inputs``.
        noise: standard deviation of the noise on each sampled output; ‖Δ*‖ is 1.
        draws: how many times the samples are drawn.
        width: in and out of the layer on which scalings are tried.
        scaling_steps: steps of training under each scaling.
        scaling_draws: how many teachers and starts each scaling is tried on.
        seed: of every random number.

    Raises:
        UserError: a size is too small; everything that is wrong is listed.
    """

    outputs: int = 32
    inputs: int = 24
    steps: int = 800
    ratio: float = 30.0
    rows: tuple[int, ...] = (48, 480)
    noise: float = 0.12
    draws: int = 8
    width: int = 32
    scaling_steps: int = 100
    scaling_draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"outputs": 4, "inputs": 4, "steps": 1, "ratio": 1, "noise": 0, "draws": 2}
        least |= {"width": 2, "scaling_steps": 1, "scaling_draws": 1, "seed": 0}
        values = dataclasses.asdict(self)
        problems = [
            f"{name} must be {low} or more, got {values[name]}."
            for name, low in least.items()
            if not values[name] >= low
        ]
        if not self.rows or min(self.rows) < self.inputs:
            problems.append(
                f"rows must be numbers of {self.inputs} (the inputs) or more, got {self.rows}: "
                "from fewer samples than inputs the least-squares update is not determined."
            )
        gather(UserError, "The theory cannot be run at this size", problems)

    @property
    def ranks(self) -> range:
        """Every rank the layer can have: 1 to min(out, in)."""
        return range(1, min(self.outputs, self.inputs) + 1)

    def call(self, out: str | None = None) -> str:
        """The command with these options, or the call in Python where it has no flag for one."""
        pairs = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        changed = {f.name: value for f, value in pairs if value != f.default}
        if set(changed) <= {"steps", "seed"}:
            flags = {} if out is None else {"out": out}
            return "rankwise theory" + "".join(f" --{k} {v}" for k, v in (flags | changed).items())
        given = "" if out is None else f"{out!r}, "
        options = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        return f"run_theory({given}theory=Theory({options}))"


@dataclass(frozen=True)
class Bound:
    """A trained update of one rank beside what no update of that rank can beat.

    ``error`` is ‖Δ* − δ‖², ``bound`` is Σ_{i>r} σi(Δ*)², and ‖Δ*‖² = 1. ``gradient`` is the norm
    of the last gradient over that of the first.
    """

    spectrum: str
    r: int
    error: float
    bound: float
    gradient: float


@dataclass(frozen=True)
class Inputs:
    """One rank under inputs that are not alike in all directions.

    In the expected loss: that of the trained update, the bound Σ_{i>r} σi(Δ* Σ^{1/2})² of
    reduced-rank regression, and what the truncated singular value decomposition of Δ* reaches.
    In the weights, ‖Δ* − δ‖²: the trained update, reduced-rank regression's, and the bound
    Σ_{i>r} σi(Δ*)².
    """

    r: int
    loss: float
    loss_bound: float
    loss_of_svd: float
    error: float
    error_of_regression: float
    error_bound: float


@dataclass(frozen=True)
class Samples:
    """One rank learned from samples; errors are ‖Δ* − δ‖², and ‖Δ*‖² = 1.

    The mean error has three parts: error = of_rank + of_estimation + of_training.

    Attributes:
        rows: the number of samples.
        r: the rank.
        of_rank: the bound Σ_{i>r} σi(Δ*)², which no update of the rank can avoid.
        learned: the error of the trained update, for each draw of the samples.
        closed: that of reduced-rank regression on the same samples, in closed form.
    """

    rows: int
    r: int
    of_rank: float
    learned: tuple[float, ...]
    closed: tuple[float, ...]

    @property
    def error(self) -> float:
        """The mean error of the trained update."""
        return fmean(self.learned)

    @property
    def standard_error(self) -> float:
        """The standard error of :attr:`error` over the draws."""
        return stdev(self.learned) / math.sqrt(len(self.learned))

    @property
    def of_estimation(self) -> float:
        """What the best update of these samples adds to the error of the rank."""
        return fmean(self.closed) - self.of_rank

    @property
    def of_training(self) -> float:
        """What training adds to that."""
        return self.error - fmean(self.closed)


@dataclass(frozen=True)
class Cell:
    """One learning rate at one rank under one scaling.

    ``left`` is ‖Δ* − δ‖² / ‖Δ*‖² after training, mean over the draws, where δ = 0 has 1; None
    when some draw ended above 1 or at no number at all: it diverged.
    """

    optimizer: str
    rule: str
    r: int
    scale: float
    rate: float
    left: float | None


@dataclass(frozen=True)
class TheoryRecord:
    """Everything the theory measured, and how; the page is a function of this alone.

    ``seconds`` is the time of the computation. ``code``, ``versions`` and ``hardware`` are as in
    the manifest of a run.
    """

    theory: Theory
    bounds: tuple[Bound, ...] = ()
    inputs: tuple[Inputs, ...] = ()
    samples: tuple[Samples, ...] = ()
    scaling: tuple[Cell, ...] = ()
    seconds: float = 0.0
    code: Mapping[str, Any] = field(default_factory=dict[str, Any])
    versions: Mapping[str, Any] = field(default_factory=dict[str, Any])
    hardware: Mapping[str, Any] = field(default_factory=dict[str, Any])


_TABLES: dict[str, type[Any]] = {
    "bounds": Bound,
    "inputs": Inputs,
    "samples": Samples,
    "scaling": Cell,
}


def write_record(path: Path, record: TheoryRecord) -> None:
    """Write records.json, whole or not at all."""
    files.write_json(path, {"format": FORMAT, "kind": KIND, **dataclasses.asdict(record)})


def read_record(path: Path) -> TheoryRecord:
    """Read what :func:`write_record` wrote.

    Raises:
        UserError: there is no such file, or it belongs to something else.
        ArtifactError: it is damaged; everything that is wrong is listed.
        EnvironmentFault: it cannot be read.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise files.missing(path) from error
    except OSError as error:
        raise files.read_fault(path, error) from error
    except ValueError as error:
        raise ArtifactError(f"'{path}' is damaged: {error}. Delete it and run again.") from error
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise UserError(f"'{path}' holds no records of `rankwise theory`. Name another --out.")
    if tree.get("format") != FORMAT:
        raise ArtifactError(
            f"'{path}' is of format {tree.get('format')!r:.20}, and this version reads {FORMAT}."
        )
    problems: list[str] = []
    theory = _make(Theory, tree.get("theory"), "theory", problems)
    seconds = cast("float", tree.get("seconds"))
    if not _fits(seconds, "float"):
        problems.append(f"'seconds' must be a number, got {seconds!r:.40}.")
    tables = {name: _table(tree.get(name), name, kind, problems) for name, kind in _TABLES.items()}
    about = {name: _tree(tree, name, problems) for name in ("code", "versions", "hardware")}
    gather(ArtifactError, f"'{path}' is damaged", problems)
    values: dict[str, Any] = {"theory": theory, "seconds": seconds, **tables, **about}
    return TheoryRecord(**values)


def _tree(tree: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    part = tree.get(name)
    if not isinstance(part, dict):
        problems.append(f"'{name}' must be a table.")
        return {}
    return cast("dict[str, Any]", part)


def _table(rows: Any, name: str, kind: type[Row], problems: list[str]) -> tuple[Row, ...]:
    if not isinstance(rows, list):
        problems.append(f"'{name}' must be a list.")
        return ()
    made = [_make(kind, row, f"{name}[{n}]", problems) for n, row in enumerate(rows)]
    return tuple(row for row in made if row is not None)


def _make(kind: type[Row], given: Any, where: str, problems: list[str]) -> Row | None:
    """One record of the given kind, or a note of what is wrong with it."""
    if isinstance(given, dict):
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    fields = {f.name: f.type for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(given, dict) or set(given) != set(fields):
        problems.append(f"'{where}' must hold {', '.join(fields)}.")
        return None
    wrong = [name for name, value in given.items() if not _fits(value, str(fields[name]))]
    if wrong:
        problems.append(f"'{where}' has wrong values for {', '.join(wrong)}.")
        return None
    return kind(**given)


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value read from JSON is of the kind that a field is declared to be."""
    if isinstance(value, bool):
        return False
    if annotation.startswith("tuple["):
        kind = annotation.removeprefix("tuple[").removesuffix(", ...]")
        return isinstance(value, tuple) and all(_fits(item, kind) for item in value)
    kinds = {
        "int": int,
        "float": (int, float),
        "str": str,
        "float | None": (int, float, type(None)),
    }
    return isinstance(value, kinds[annotation])
