"""`rankwise trim`: the smallest adapter that keeps a promise, and what the cut costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.cli.console import make_reporter, table

if TYPE_CHECKING:
    from rankwise.io.convert import Wishes
    from rankwise.io.trimming import TrimmedFolder
    from rankwise.methods.trimming import Prefix
    from rankwise.spectrum import Promise
    from rankwise.train.trying import Bench

__all__ = ["command"]

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def command(
    adapter: Annotated[
        str, typer.Argument(help="Folder or file of an adapter, or a run.", metavar="ADAPTER")
    ],
    *,
    out: Annotated[str, typer.Option(help="Folder to write.", metavar="FOLDER")],
    r: Annotated[int | None, typer.Option(help="At most this rank in every layer.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of Σ σ² over all layers to keep, such as 0.99.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Largest ‖δ − δ'‖ / ‖δ‖ over all layers, such as 1e-3.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Most parameters in A and B, such as 100k.", metavar="NUMBER"),
    ] = None,
    prefix: Annotated[
        int | None,
        typer.Option(help="First ranks of the largest, and their share of every other layer's."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled rows to measure the change of the metric on.", metavar="FILE"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Base model for --data; a run knows its own.", metavar="MODEL"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model, for what the adapter's file leaves to it.", metavar="MODEL"),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Format of the adapter; told by the files when not given."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="loralib: lora_alpha of the training, not in its files.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Which model of a diffusion pipeline.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open .bin, .pt and the like, as tensors only.")
    ] = False,
) -> None:
    """Cut an adapter to the smallest one that keeps a promise, and say what it costs.

    One of --r, --energy, --max-error, --budget and --prefix says what is kept. The ranks of all
    layers are chosen together by their singular values; the table has the error of each. With
    --data both adapters are also run on these rows, and the change of the metric is told beside its
    noise. The result is a folder in PEFT's format. A run knows its own base.

    Example: rankwise trim runs/first --energy 0.99 --data dev.tsv --out trimmed
    """
    promise = _promise(r, energy, max_error, budget, prefix)
    from rankwise.io.convert import Wishes
    from rankwise.io.loralib import Unsaid

    wishes = Wishes(
        source=source,
        base=_base(adapter, base, model),
        component=component,
        unsaid=Unsaid(alpha=alpha),
        allow_pickle=allow_pickle,
    )
    bench = None if data is None else _bench(adapter, out, data, model or base)
    _cut(adapter, promise, out, wishes, bench)


def _cut(
    adapter: str, promise: Promise | Prefix, out: str, wishes: Wishes, bench: Bench | None
) -> None:
    from rankwise.io.peft_alone_keys import ModelNeeded
    from rankwise.io.trimming import trim_adapter, trim_on_model

    try:
        made = trim_adapter(adapter, promise, out, wishes)
    except ModelNeeded as needed:
        from rankwise.train.bare import bare_base

        model = bare_base(adapter, wishes.base, needed)
        made = trim_on_model(adapter, promise, out, model, wishes)
    _show(made, promise)
    if bench is not None:
        print(_measured(made, bench))
    print(f"adapter: {out}")


def _base(adapter: str, base: str | None, model: str | None) -> Path | None:
    """Where the base lies: the one that was named, or a run's own where it is on this machine."""
    from rankwise.train.snapshot import base_of_run, local_folder

    if base is not None:
        return local_folder(base)
    if model is not None and Path(model).exists():
        return Path(model)
    own = base_of_run(adapter)
    return None if own is None else own[1]


def _promise(
    r: int | None,
    energy: float | None,
    max_error: float | None,
    budget: str | None,
    prefix: int | None,
) -> Promise | Prefix:
    from rankwise.errors import UserError
    from rankwise.methods.trimming import Prefix
    from rankwise.spectrum import Budget, Energy, MaxError, Top

    words = ("--r", "--energy", "--max-error", "--budget", "--prefix")
    given = dict(zip(words, (r, energy, max_error, budget, prefix), strict=True))
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) != 1:
        told = " and ".join(named) or "nothing"
        raise UserError(f"Say what to keep by one of {', '.join(words)}; got {told}.")
    if r is not None:
        return Top(r)
    if energy is not None:
        return Energy(energy)
    if prefix is not None:
        return Prefix(prefix)
    if max_error is not None:
        return MaxError(max_error)
    return Budget(_number(budget or ""))


def _number(text: str) -> int:
    from rankwise.errors import UserError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)", text.strip().lower())
    if found is None:
        raise UserError(f"--budget must be a number such as 100000, 100k or 1.5M, got '{text}'.")
    return int(float(found[1]) * _UNITS[found[2]])


def _show(made: TrimmedFolder, promise: Promise | Prefix) -> None:
    cuts = made.trimmed.cuts
    worst = sorted(cuts, key=lambda name: cuts[name].predicted, reverse=True)
    rows = [
        [n, str(cuts[n].before), str(cuts[n].after), f"{100 * cuts[n].predicted:.4f} %"]
        for n in worst
    ]
    print(table(["layer", "r", "kept", "error"], rows))
    trimmed, chosen = made.trimmed, made.trimmed.allocation
    before = sum(f.count() for f in made.before.factors.values())
    print(
        f"\n{before:,} parameters became {trimmed.parameters:,} "
        f"({100 * trimmed.parameters / before:.1f} %); error over all layers "
        f"{100 * chosen.error:.4f} % predicted, {100 * trimmed.error:.4f} % measured."
    )
    print(_how(made, promise))
    for note in made.notes:
        print(note)


def _how(made: TrimmedFolder, promise: Promise | Prefix) -> str:
    """How the ranks were chosen, and how far from the best that may be."""
    from rankwise.methods.trimming import Prefix
    from rankwise.spectrum import Budget, Top

    chosen = made.trimmed.allocation
    if isinstance(promise, Prefix):
        return "Ranks: the first of each layer, as they were trained; meant for --train-nested."
    if isinstance(promise, Top):
        return "Ranks: the largest singular values of each layer, which is the best of that rank."
    costs = {f.count() // f.r for f in made.before.factors.values()}
    way = (
        "the largest σ² over all layers, as every rank costs the same"
        if len(costs) == 1
        else "a knapsack of σ² by parameters"
    )
    if chosen.optimal:
        what = (
            "within the budget is nearer"
            if isinstance(promise, Budget)
            else "that keeps this is smaller"
        )
        return f"Ranks: {way}; no adapter {what}."
    if isinstance(promise, Budget):
        return f"Ranks: {way}; the best error possible is at least {100 * chosen.bound:.4f} %."
    return f"Ranks: {way}; at most {chosen.parameters - chosen.bound:,.0f} parameters too many."


def _bench(adapter: str, out: str, data: str, model: str | None) -> Bench:
    """The base and the rows that both adapters are run on, found before anything is written."""
    from rankwise.errors import UserError
    from rankwise.io.convert import refuse_place
    from rankwise.io.detect import home
    from rankwise.train.trying import bench_of_model, bench_of_run

    refuse_place(Path(out), home(adapter))
    reporter = make_reporter()
    if (Path(adapter) / "manifest.json").exists():
        return bench_of_run(adapter, data, model=model, reporter=reporter)
    if model is not None:
        return bench_of_model(model, data, reporter=reporter)
    raise UserError(f"'{adapter}' is no run, so --data also needs the base: --model MODEL.")


def _measured(made: TrimmedFolder, bench: Bench) -> str:
    """The change of the metric from the adapter to the cut one."""
    from rankwise.lab.changes import change

    both = (made.before.adapter, made.trimmed.adapter)
    first, second = bench.tried(both, make_reporter())
    return (
        f"measured on {len(bench.rows.encoded)} rows: {change(first, second, bench.metric).line()}"
    )
